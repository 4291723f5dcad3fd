"""The files of a tokenizer that go along with a converted model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as schema

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_json, reading
from megatron_specialm.convert.safe_pickle import COPY_AGAIN
from megatron_specialm.data.tokenizer import SETTINGS, Tokenizer

TOKENIZER = "tokenizer"  # the folder beside a canonical step
SENTENCEPIECE = "tokenizer.model"
_JSON, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_VOCABULARY, _ADDED = "vocab.json", "added_tokens.json"
_FILES = (
    _JSON, _CONFIG, "special_tokens_map.json", _ADDED, SENTENCEPIECE, _VOCABULARY,
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def find_tokenizer(folder: Path) -> Path | None:
    """The folder itself if it has a tokenizer's files."""
    return folder if any((folder / name).is_file() for name in (_JSON, SENTENCEPIECE, _VOCABULARY)) else None


def is_ours(folder: Path) -> bool:
    """Whether a folder is that of a `tokenizer` stage."""
    return (folder / SETTINGS).is_file() and (folder / _JSON).is_file()


def special_ids(folder: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id, as far as a tokenizer has such tokens."""
    if is_ours(folder):
        ours = Tokenizer.load(folder)
        return {"bos_token_id": ours.bos, "eos_token_id": ours.eod, "pad_token_id": ours.pad}
    if not (folder / _JSON).is_file() or not (folder / _CONFIG).is_file():
        return {}
    settings, tokenizer = read_json(folder / _CONFIG, dict[str, Any], remedy=COPY_AGAIN), _load(folder)
    found = {}
    for role in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(role)
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str) and (number := tokenizer.token_to_id(name)) is not None:
            found[f"{role}_id"] = number
    return found


def copy_tokenizer(source: Path, target: Path, *, context_length: int, sentencepiece: bool = True) -> None:
    """Copy a tokenizer's files; one of ours as Transformers loads it.

    Args:
        context_length: of the model, in tokens.
        sentencepiece: copy `tokenizer.model` too, beside `tokenizer.json`.
    """
    if is_ours(source):
        from megatron_specialm.convert.tokenizer import save_tokenizer  # imports Transformers, slowly

        save_tokenizer(Tokenizer.load(source), target, context_length=context_length, sentencepiece=sentencepiece)
        return
    target.mkdir(parents=True, exist_ok=True)
    left_out = () if sentencepiece or not (source / _JSON).is_file() else (SENTENCEPIECE,)
    for name in _FILES:
        if name not in left_out and (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_tokenizer(folder: Path, *, vocabulary_size: int) -> None:
    """Check that a model has a row for each of a tokenizer's ids. (It may have more: many models round the number up.)

    Raises:
        CheckpointError: it has not.
        ArtifactError: the tokenizer's file is damaged.
    """
    name = next((name for name in _IDS if (folder / name).is_file()), None)
    if name is None:
        return
    with reading(folder / name, form="a tokenizer", remedy=COPY_AGAIN):
        largest = _IDS[name](folder)
    if largest >= vocabulary_size:
        raise CheckpointError(
            f"{folder / name}: has ids up to {largest}, and the model {vocabulary_size} rows: it is the tokenizer of another "
            "model"
        )


def _load(folder: Path) -> tokenizers.Tokenizer:
    with reading(folder / _JSON, form="a tokenizer", remedy=COPY_AGAIN):
        return tokenizers.Tokenizer.from_file(str(folder / _JSON))


def _of_sentencepiece(folder: Path) -> int:
    proto = schema.ModelProto.FromString((folder / SENTENCEPIECE).read_bytes())
    return max(len(proto.pieces) - 1, _of_dicts(folder, _ADDED))


def _of_dicts(folder: Path, *names: str) -> int:
    """The largest id in files that are dicts from tokens to ids."""
    found = (read_json(folder / name, dict[str, int], remedy=COPY_AGAIN) for name in names if (folder / name).is_file())
    return max((number for ids in found for number in ids.values()), default=-1)


# How the largest id is found, by the file that a tokenizer is read from: the first that there is.
_IDS: dict[str, Callable[[Path], int]] = {
    _JSON: lambda folder: max(_load(folder).get_vocab(with_added_tokens=True).values(), default=-1),
    SENTENCEPIECE: _of_sentencepiece,
    _VOCABULARY: lambda folder: _of_dicts(folder, _VOCABULARY, _ADDED),
}
