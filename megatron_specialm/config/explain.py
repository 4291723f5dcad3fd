"""pydantic's validation errors as messages that name the key, the value and the fix."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from megatron_specialm.config.yaml_file import SHOWN, Guessed, shorten

MAX_LINES = 20  # one line per mistake
_MAPPINGS = ("dict_type", "model_type", "model_attributes_type")
_FIXES = {
    "string_type": "quote it",
    "int_type": "write a whole number, without quotes, point or exponent, as in 1000",
    "float_type": "write a number without quotes, as in 0.5 or 1e-4",
    "bool_type": "write true or false, without quotes",
    **dict.fromkeys(("list_type", "tuple_type"), "write a list, as in [a, b]"),
    **dict.fromkeys(_MAPPINGS, "write one key and value a line, or leave the key out"),
}


def explain(
    error: ValidationError,
    *,
    key_of: Callable[[tuple[int | str, ...]], str],
    valid_keys: Callable[[tuple[int | str, ...]], Sequence[str]],
) -> list[str]:
    """One line per mistake, for the first `MAX_LINES`: dotted key, what is wrong, the value, and for an unknown key the nearest
    valid one.

    Args:
        key_of: turns a pydantic location into the dotted key of the config.
        valid_keys: lists the keys that are valid beside the last part of a location.
    """
    items = error.errors()
    lines = [_line(item, key_of(item["loc"])[:SHOWN], valid_keys) for item in items[:MAX_LINES]]
    return [*lines, f"and {len(items) - MAX_LINES:,} more mistakes"] if len(items) > MAX_LINES else lines


def _line(item: Any, key: str, valid_keys: Callable[[tuple[int | str, ...]], Sequence[str]]) -> str:
    if item["type"] == "extra_forbidden":
        known = valid_keys(item["loc"])
        return f"{key}: unknown key{did_you_mean(str(item['loc'][-1]), known)}; valid keys: {', '.join(sorted(known))}"
    if item["type"] == "missing":
        return f"{key}: required, and missing"
    value = item["input"]
    if item["type"] in ("union_tag_not_found", "union_tag_invalid") and isinstance(value, dict):
        return _wrong_tag(item, key)
    if isinstance(value, Guessed):
        return f"{key}: {value}"
    # For mappings, pydantic's own message names the Python class.
    message = "must be keys and values" if item["type"] in _MAPPINGS else item["msg"].removeprefix("Value error, ")
    if fix := "give a value, or leave the key out" if value is None else _FIXES.get(item["type"]):
        message += f": {fix}"
    got = "" if isinstance(value, dict) else f" (got {shorten(value)})"
    return f"{key}: {message}{got}" if key else f"{message}{got}"


def _wrong_tag(item: Any, key: str) -> str:
    """The discriminator of a union (`kind`, `data`) is missing or has an unknown value."""
    field = item["ctx"]["discriminator"].strip("'")
    value = item["input"].get(field)
    if field not in item["input"]:
        return f"{key}.{field}: required, and missing"
    if isinstance(value, Guessed):
        return f"{key}.{field}: {value}"
    known = [tag.strip("'") for tag in item["ctx"].get("expected_tags", "").split(", ") if tag]
    return f"{key}.{field}: must be one of {', '.join(known)} (got {shorten(value)}){did_you_mean(str(value), known)}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` with the known word nearest to a mistaken one; empty where none is near."""
    word = word[:SHOWN]
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5) or [
        one for one in known if word and one.startswith(word)
    ]
    return f"; did you mean {matches[0]!r}?" if matches else ""
