"""The text of a pipeline's config: the generic set, and the domains with their sizes."""

import re
from typing import Any, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from megatron_specialm.config.base import PathText, Settings

GENERIC = "generic"  # the key of the generic set, and of tasks that serve every domain


class ValidationFloor(Settings):
    """What is validated on at least. Early stopping on less keeps weights by chance."""

    documents: PositiveInt = 4
    tokens: PositiveInt = 2_000

    def is_met(self, documents: int, tokens: int) -> bool:
        """Whether so much is enough."""
        return documents >= self.documents and tokens >= self.tokens

    def share(self, shards: int) -> Self:
        """Of each of so many shards, which meet the floor together."""
        return self.model_copy(update={"documents": -(-self.documents // shards), "tokens": -(-self.tokens // shards)})


class TextSet(Settings):
    """The files of one set. Entries are paths, globs, or `hf:NAME[:CONFIG[:SPLIT]]` for a Hugging Face dataset."""

    train: list[PathText] = Field(min_length=1)
    test: list[PathText] = Field(min_length=1)
    validation: list[PathText] = Field(default=[], description="default: a share of the training documents is held out")
    validation_floor: ValidationFloor = Field(
        default=ValidationFloor(),
        description="of a small set more is held out until it is so much, up to half of the set; where a stage validates on "
        "less, also of `validation` files, it is an error",
    )
    text_field: str = Field(default="text", description="the key or column that holds a document's text")
    train_tokens: PositiveInt | None = Field(
        default=None, description="train on the first documents that hold at most so many tokens; default: on all"
    )
    shards: PositiveInt = Field(
        default=1,
        le=99_999,
        description="prepare the training files in so many shards, tasks of their own; each is a range of the files",
    )
    domain: str | None = Field(
        default=None, description="the domain that this is a size of; set where the config says `sizes` of a domain"
    )

    @field_validator("train", "test", "validation", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_way_to_cut(self) -> Self:
        if self.shards > 1 and self.train_tokens is not None:
            raise ValueError(
                f"`shards: {self.shards}` with `train_tokens: {self.train_tokens}`: where a set of so many tokens ends is "
                "known only when its documents are read in a row: leave one of them out"
            )
        return self


class Text(Settings):
    """The large generic set and the small domain sets.

    A domain with `sizes: [50_000, 1_000_000]` (training tokens) stands for one domain per size, `legal-50k` and
    `legal-1m`, with the same test set; without `validation` files, what is held out is of the same size's
    text, and of the text behind it where that is below the `validation_floor`.
    """

    generic: TextSet
    domains: dict[str, TextSet] = Field(min_length=1)
    made_by: str | None = Field(
        default=None, description="the command that makes these files, to be named where one is missing; never run"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_domain_per_size(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("domains"), dict):
            return value
        domains: dict[str, Any] = {}
        for name, files in value["domains"].items():
            sized = _sizes(name, files) if isinstance(files, dict) and "sizes" in files else {name: files}
            for taken in sized.keys() & domains.keys():
                raise ValueError(f"domains.{name}: {taken!r} is there twice, as a size and by name: rename one")
            domains |= sized
        return {**value, "domains": domains}

    @field_validator("domains")
    @classmethod
    def _names(cls, value: dict[str, TextSet]) -> dict[str, TextSet]:
        for name in [*value, *(files.domain for files in value.values() if files.domain is not None)]:
            if name == GENERIC or re.fullmatch(r"c\d+", name) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,79}", name):
                raise ValueError(
                    f"domain name {name!r}: use small letters, digits, '_' and '-', at most 80; '{GENERIC}' is taken by the "
                    "generic set, and c0, c1, ... by the experts of clusters"
                )
        return value


def _sizes(name: str, files: dict[str, Any]) -> dict[str, Any]:
    """The domains that a domain with `sizes` stands for, by their names."""
    sizes = files["sizes"]
    valid = isinstance(sizes, list) and sizes and all(type(size) is int and size > 0 for size in sizes)
    if not valid or len(set(sizes)) < len(sizes) or files.keys() & {"train_tokens", "domain"}:
        raise ValueError(
            f"domains.{name}.sizes: {sizes!r}: give different numbers of training tokens, as in [50_000, 1_000_000], and "
            "neither `train_tokens` nor `domain` beside them"
        )
    common = {key: value for key, value in files.items() if key != "sizes"}
    return {f"{name}-{size_name(size)}": {**common, "train_tokens": size, "domain": name} for size in sizes}


def size_name(tokens: int) -> str:
    """A number of tokens as in names and on axes, exact: 50k, 1m, or all its digits."""
    for unit, letter in ((1_000_000, "m"), (1_000, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)
