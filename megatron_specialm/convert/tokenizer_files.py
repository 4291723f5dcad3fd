"""The files of a tokenizer that go along with a converted model."""

import shutil
from pathlib import Path

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import reading

TOKENIZER = "tokenizer"  # the folder beside a canonical step
_JSON = "tokenizer.json"
_FILES = (
    _JSON, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def find_tokenizer(folder: Path) -> Path | None:
    """The folder itself if it has a tokenizer's files."""
    return folder if any((folder / name).is_file() for name in (_JSON, "tokenizer.model", "vocab.json")) else None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_tokenizer(folder: Path, *, vocabulary_size: int) -> None:
    """Check that a model has a row for each of a tokenizer's ids. (It may have more: many models round the number up.)

    Raises:
        CheckpointError: it has not.
        ArtifactError: tokenizer.json is damaged.
    """
    path = folder / _JSON
    if not path.is_file():
        return
    import tokenizers

    with reading(path, form="a tokenizer"):
        ids = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()
    if max(ids, default=-1) >= vocabulary_size:
        raise CheckpointError(
            f"{path}: has ids up to {max(ids)}, and the model {vocabulary_size} rows: it is the tokenizer of another model"
        )
