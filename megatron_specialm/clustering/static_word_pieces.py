"""Vectors of texts: the mean of word-piece embeddings from an installed package."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from megatron_specialm.base.errors import ArtifactError, ConfigError, MachineError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.base.packages import import_package
from megatron_specialm.clustering.vectors import unit_rows
from megatron_specialm.config.schema import StaticEncoder

STATIC_DIMENSIONS = (64, 128, 256)  # the lengths to which wordllama's vectors may be truncated


@dataclass(frozen=True)
class _Static:
    """The content of `static.json`: the package's version, and the number of dimensions used."""

    wordllama: str
    dimensions: int


class StaticWordPieces:
    """The mean of the word-piece embeddings of the package wordllama (`l2_supercat`, derived from Llama 2's).

    flops_per_token: E, one addition per dimension.
    """

    def __init__(self, dimensions: int) -> None:
        if dimensions not in STATIC_DIMENSIONS:
            raise ConfigError(f"encoder.dimensions {dimensions}: static vectors have 64, 128 or 256")
        try:
            wordllama = import_package("wordllama")
        except ImportError as error:
            raise MachineError(f"the static encoder cannot be used ({error}): pip install wordllama") from None
        package = Path(str(wordllama.__file__)).parent
        # The package looks for its tokenizer in a wrong folder and in its cache folder: set the latter.
        self._model = wordllama.WordLlama.load(trunc_dim=dimensions, disable_download=True, cache_dir=package)
        self._dimensions = dimensions

    @classmethod
    def fit(cls, settings: StaticEncoder, draw: Callable[[int], list[str]], *, seed: int, threads: int) -> Self:
        return cls(settings.dimensions)

    @classmethod
    def load(cls, folder: Path, settings: StaticEncoder, *, threads: int) -> Self:
        """The weights are in the package, so its version must be the one that embedded the generic set."""
        saved, installed = read_json(folder / "static.json", _Static), importlib.metadata.version("wordllama")
        if saved.wordllama != installed:
            raise ArtifactError(
                f"{folder}: made with wordllama {saved.wordllama}, but {installed} is installed: "
                f"pip install wordllama=={saved.wordllama}, or remove the embed artifact and run again"
            )
        return cls(saved.dimensions)

    def save(self, folder: Path) -> None:
        version = importlib.metadata.version("wordllama")
        write_json(folder / "static.json", asdict(_Static(version, self._dimensions)))

    @property
    def dimensions(self) -> int:
        return self._dimensions

    @property
    def flops_per_token(self) -> int:
        return self._dimensions

    @property
    def counts(self) -> dict[str, int]:
        return {}

    def encode(self, texts: list[str]) -> np.ndarray:
        return unit_rows(self._model.embed(texts))
