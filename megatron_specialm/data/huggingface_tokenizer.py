"""A tokenizer as a Hugging Face folder has it, read for our own use.

`tokenizer.json` decides how text is encoded. Of `tokenizer_config.json` (or `special_tokens_map.json`, as older folders
have it) come the names of special tokens and what else an exported folder should keep. A name that is no token of
`tokenizer.json` is passed over: Transformers would add it, with an id that no model trained on these ids has a row for.
"""

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers

from megatron_specialm.base.errors import DataError
from megatron_specialm.data.sentencepiece_conversion import NEVER
from megatron_specialm.data.tokenizer_checks import check_description, check_settings, read_mapping, read_text, refusing

logger = logging.getLogger(__name__)

JSON, CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


def read_huggingface(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of `tokenizer.json`, changed in two ways: nothing adds tokens to a text, cuts or pads it; and text that
    spells the end token stays text. Second, the settings: `eod`, the end token's name, and `kept` (`pad_token`, `unk_token`,
    `padding_side`, `chat_template`, where the source has them).

    Raises:
        DataError: a file that cannot be read, or no end token among the tokens.
    """
    description = {"added_tokens": [], "model": {}, **read_mapping(source / JSON)}
    description |= {"post_processor": None, "truncation": None, "padding": None}
    check_description(source / JSON, description)
    with refusing(source / JSON, f"not a tokenizer that tokenizers {tokenizers.__version__} can load"):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    for number, token in enumerate(description["added_tokens"]):
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise DataError(
                f"{source / JSON}: added_tokens[{number}].id: tokenizers gives {token['content']!r} the id "
                f"{tokenizer.token_to_id(token['content'])} (got {token['id']}): save the tokenizer again"
            )
    said = {**_read_settings(source / SPECIAL_TOKENS), **_said(_read_settings(source / CONFIG))}
    eod = _name(said.get("eos_token"))
    if eod is None or tokenizer.token_to_id(eod) is None:
        added = ", ".join(repr(token["content"]) for token in description["added_tokens"]) or "none"
        what = f"eos_token {said.get('eos_token')!r} is not a token" if "eos_token" in said else "names no eos_token"
        raise DataError(
            f"{source / CONFIG}: {what}: documents need an end: name one of the tokens there (added tokens: {added})"
        )
    kept = _kept(source, said, tokenizer)
    for name in {eod, *(kept[role] for role in ("pad_token", "unk_token") if role in kept)}:
        _make_special(description, name, tokenizer)
    _make_unreachable(description["model"], eod)
    return description, {"eod": eod, "kept": kept}


def _make_special(description: dict[str, Any], name: str, tokenizer: tokenizers.Tokenizer) -> None:
    """Text is encoded with special tokens off, so what has such a role has to be one: an added token that is not would be
    found in text which spells it. (Transformers takes it for one by its role.)"""
    added = {token["content"]: token for token in description["added_tokens"]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    number = tokenizer.token_to_id(name)
    added[name] = {"id": number, "content": name, **flags, **added.get(name, {}), "special": True}
    description["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def _make_unreachable(model: dict[str, Any], end: str) -> None:
    """A unigram model may have its end token among its ordinary pieces, and would find it in text which spells it. (Models
    of other types are tried with such text when they are imported.)"""
    if model.get("type") == "Unigram":
        model["vocab"] = [[piece, NEVER if piece == end else score] for piece, score in model["vocab"]]


def _kept(source: Path, said: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for role in ("pad_token", "unk_token"):
        name = _name(said.get(role))
        if name is not None and tokenizer.token_to_id(name) is not None:
            kept[role] = name
        elif name is not None:
            logger.warning("%s: its %s %r is no token of %s and is passed over", source, role, name, JSON)
    if said.get("padding_side"):
        kept["padding_side"] = said["padding_side"]
    template = source / CHAT_TEMPLATE
    chat_template = read_text(template) if template.is_file() else said.get("chat_template")
    return kept if chat_template is None else {**kept, "chat_template": chat_template}


def _name(token: Any) -> str | None:
    """The text of a special token: itself, or the `content` of a mapping."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _said(config: dict[str, Any]) -> dict[str, Any]:
    """What a file really says: null is nothing."""
    return {name: value for name, value in config.items() if value is not None}


def _read_settings(path: Path) -> dict[str, Any]:
    """What stands in one of the files that say more; nothing where there is none."""
    said = read_mapping(path) if path.is_file() else {}
    check_settings(path, said)
    return said
