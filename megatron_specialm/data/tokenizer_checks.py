"""Checks of a tokenizer's files before a library loads them. The libraries do not check everything: a wrong file may end in a
panic, or in an embedding table with as many rows as the largest id.

Each error names the file, the key and the value. Keys are paths, as `model.vocab['a']` or `added_tokens[3].id`.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import DataError, SpecialmError
from megatron_specialm.base.files import read_regular
from megatron_specialm.config.yaml_file import shorten

MOST_BYTES = 1 << 28  # of a file; the largest vocabularies take 40 MB
MOST_IDS = 1 << 22
MOST_GAPS = 1000  # unused ids, beyond as many as there are tokens: some vocabularies are padded to a round number
FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
AGAIN = "save the tokenizer again"
Entry = tuple[str, str, Any]  # a key, its token, and the value in place of the token's id


def read_file(path: Path) -> bytes:
    """The content of a tokenizer's file.

    Raises:
        DataError: it cannot be read, is no regular file, or is larger than any tokenizer.
    """
    try:
        return read_regular(path, most_bytes=MOST_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}: correct the tokenizer's path") from None


def read_text(path: Path) -> str:
    """The text of a tokenizer's file, in UTF-8. Raises as `read_file`."""
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as UTF-8 ({error}): {AGAIN}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, without NaN. Raises as `read_file`."""

    def refuse(text: str) -> float:
        raise ValueError(f"{text} is no number")

    text = read_text(path)
    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}): {AGAIN}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a mapping as Hugging Face writes it (got {shorten(value)}): {AGAIN}")
    return value


@contextlib.contextmanager
def refusing(path: Path, what: str, *, kind: type[SpecialmError] = DataError, fix: str = AGAIN) -> Iterator[None]:
    """Convert any error of a library, also bare Exceptions and panics, to one that names the file. Errors of the operating
    system are not converted.

    Raises:
        SpecialmError: of class `kind`, in place of the library's.
    """
    try:
        yield
    except (SpecialmError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise kind(f"{path}: {what} ({' '.join(str(error).split())[:300]}): {fix}") from None


def check_description(path: Path, description: Mapping[str, Any]) -> None:
    """Refuse a `tokenizer.json` with an id, token or score that is not valid, an id or token twice, or an id far above the
    others.

    Raises:
        DataError: with the key and the value.
    """
    model = description.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = description.get("added_tokens")
    if not isinstance(model, dict):
        raise _wrong(path, "model", model, "a mapping")
    if not isinstance(added, list):
        raise _wrong(path, "added_tokens", added, "a list")
    if isinstance(vocabulary, dict):
        own = [(f"model.vocab[{token!r}]", token, number) for token, number in vocabulary.items()]
    elif isinstance(vocabulary, list):
        own = [
            (f"model.vocab[{number}]", _piece(path, number, entry), number) for number, entry in enumerate(vocabulary)
        ]
    else:
        raise _wrong(path, "model.vocab", vocabulary, "tokens with their ids, or pieces with their scores")
    _check_ids(path, own)
    extra = [_added(path, number, token) for number, token in enumerate(added)]
    _check_ids(path, extra)
    together = {number: (key, token) for key, token, number in (*own, *extra)}
    largest = max(together, default=0)
    if largest >= 2 * len(together) + MOST_GAPS:
        raise _wrong(
            path, together[largest][0], largest,
            f"an id among the others: a model would have {largest + 1:,} rows for {len(together):,} tokens",
        )  # fmt: skip


def _piece(path: Path, number: int, entry: Any) -> str:
    key = f"model.vocab[{number}]"
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
        raise _wrong(path, key, entry, "a piece and its score")
    if not is_number(entry[1]):
        raise _wrong(path, key, entry, "a piece and its score, which must be a finite number")
    return entry[0]


def _added(path: Path, number: int, token: Any) -> Entry:
    key = f"added_tokens[{number}]"
    if not isinstance(token, dict):
        raise _wrong(path, key, token, "a mapping with id and content")
    content = token.get("content")
    if not isinstance(content, str) or not content:
        raise _wrong(path, f"{key}.content", content, "the token's text")
    for flag in FLAGS:
        if not isinstance(token.get(flag, False), bool):
            raise _wrong(path, f"{key}.{flag}", token[flag], "true or false")
    return f"{key}.id", content, token.get("id")


def _check_ids(path: Path, entries: list[Entry]) -> None:
    tokens: set[str] = set()
    keys: dict[int, str] = {}
    for key, token, number in entries:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MOST_IDS:
            raise _wrong(path, key, number, f"a whole number from 0, below {MOST_IDS:,}")
        if number in keys:
            raise _wrong(path, key, number, f"an id of its own: {keys[number]} has it too")
        if token in tokens:
            raise _wrong(path, key, token, "a token that stands once")
        keys[number] = key
        tokens.add(token)


def is_number(value: Any) -> bool:
    """Whether it is a finite number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a `tokenizer_config.json` or `special_tokens_map.json` in which a field that we read has a wrong type.

    Raises:
        DataError: with the key and the value.
    """
    for role in ("pad_token", "unk_token"):  # `read_huggingface` checks eos_token
        value = settings.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        if value is not None and not (isinstance(content, str) and content):
            raise _wrong(path, role, value, "a token's text, or a mapping with its `content`")
    if settings.get("padding_side") not in (None, "left", "right"):
        raise _wrong(path, "padding_side", settings["padding_side"], "left or right")
    template = settings.get("chat_template")
    named = isinstance(template, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in template
    )
    if not (template is None or isinstance(template, str) or named):
        raise _wrong(path, "chat_template", template, "a text, or a list of texts with their names")


def check_pieces(path: Path, proto: Any) -> None:
    """Refuse the protobuf of a SentencePiece model with an id, piece or score that is not valid, or a piece twice.

    Raises:
        DataError: with the key and the value.
    """
    pieces, spec = proto.pieces, proto.trainer_spec
    if not 0 < len(pieces) < MOST_IDS:
        raise _wrong(path, "pieces", len(pieces), f"from 1 to {MOST_IDS:,} pieces")
    for key, least in (("unk_id", 0), ("bos_id", -1), ("eos_id", -1), ("pad_id", -1)):
        number = getattr(spec, key)
        if not least <= number < len(pieces):
            raise _wrong(path, f"trainer_spec.{key}", number, f"the number of one of the {len(pieces):,} pieces")
    if pieces[spec.unk_id].type != pieces[spec.unk_id].UNKNOWN:
        raise _wrong(path, "trainer_spec.unk_id", spec.unk_id, "the number of the piece for what is unknown")
    places: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if not piece.piece or piece.piece in places:
            raise _wrong(path, f"pieces[{number}].piece", piece.piece, "a text that no other piece has")
        if not math.isfinite(piece.score):
            raise _wrong(path, f"pieces[{number}].score", piece.score, "a finite number")
        places[piece.piece] = number


def _wrong(path: Path, key: str, value: Any, wanted: str) -> DataError:
    return DataError(f"{path}: {key[:200]}: must be {wanted} (got {shorten(value)}): {AGAIN}")
