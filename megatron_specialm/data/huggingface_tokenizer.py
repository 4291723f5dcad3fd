"""Reading the tokenizer of a Hugging Face folder.

`tokenizer.json` defines the encoding. `tokenizer_config.json` (in older folders `special_tokens_map.json`) names the special
tokens and holds other settings for the export. A name that is no token of `tokenizer.json` is ignored: Transformers would add
it, with an id for which no model trained on these ids has a row.
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
    """Read a folder.

    Returns:
        The content of `tokenizer.json`, with two changes: nothing adds tokens to a text, truncates or pads it; and text that
        spells the end token stays text.
        The settings: `eod`, the name of the end token; `bos`, that of the start token, if it is another; and `kept`, those of
        `pad_token`, `unk_token`, `padding_side` and `chat_template` that the folder has.

    Raises:
        DataError: a file cannot be read, or the end token is none of the tokens.
    """
    theirs = {"added_tokens": [], "model": {}, **read_mapping(source / JSON)}
    description = {**theirs, "post_processor": None, "truncation": None, "padding": None}
    check_description(source / JSON, description)
    with refusing(source / JSON, f"not a tokenizer that tokenizers {tokenizers.__version__} can load"):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    for number, token in enumerate(description["added_tokens"]):
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise DataError(
                f"{source / JSON}: added_tokens[{number}].id: tokenizers gives {token['content']!r} the id "
                f"{tokenizer.token_to_id(token['content'])} (got {token['id']}): save the tokenizer again"
            )
    own = {name: value for name, value in _read_settings(source / CONFIG).items() if value is not None}
    config = {**_read_settings(source / SPECIAL_TOKENS), **own}
    eod = _name(config.get("eos_token"))
    if eod is None or tokenizer.token_to_id(eod) is None:
        added = ", ".join(repr(token["content"]) for token in description["added_tokens"]) or "none"
        what = (
            f"eos_token {config.get('eos_token')!r} is not a token" if "eos_token" in config else "names no eos_token"
        )
        raise DataError(
            f"{source / CONFIG}: {what}: documents need an end: name one of the tokens there (added tokens: {added})"
        )
    export = _export_settings(source, config, tokenizer)
    bos = _start_token(source, theirs) or eod
    for name in {eod, bos, *(export[role] for role in ("pad_token", "unk_token") if role in export)}:
        _make_special(description, name, tokenizer)
    _make_unreachable(description["model"], eod)
    return description, {"eod": eod, **({} if bos == eod else {"bos": bos}), "kept": export}


def _start_token(source: Path, description: dict[str, Any]) -> str | None:
    """The token that the post-processor of `tokenizer.json` puts before a text. None where it puts none. (Beside that file
    Transformers 5 ignores `add_bos_token`.)"""
    with refusing(source / JSON, f"not a tokenizer that tokenizers {tokenizers.__version__} can load"):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**description, "truncation": None, "padding": None}))
        bare, whole = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
        return tokenizer.id_to_token(whole[0]) if len(whole) > len(bare) and whole[1 : 1 + len(bare)] == bare else None


def _make_special(description: dict[str, Any], name: str, tokenizer: tokenizers.Tokenizer) -> None:
    """Make an added token special. Text is encoded without special tokens; an added token that is not special would be found
    in text that spells it. (Transformers makes it special by its role.)"""
    added = {token["content"]: token for token in description["added_tokens"]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    number = tokenizer.token_to_id(name)
    added[name] = {"id": number, "content": name, **flags, **added.get(name, {}), "special": True}
    description["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def _make_unreachable(model: dict[str, Any], end: str) -> None:
    """Give the end token of a unigram model a score with which no text matches it, also where it is an ordinary piece.
    (Models of other types are tried with such text when they are imported.)"""
    if model.get("type") == "Unigram":
        model["vocab"] = [[piece, NEVER if piece == end else score] for piece, score in model["vocab"]]


def _export_settings(source: Path, config: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """What an export repeats, named as in `tokenizer_config.json`."""
    export: dict[str, Any] = {}
    for role in ("pad_token", "unk_token"):
        name = _name(config.get(role))
        if name is not None and tokenizer.token_to_id(name) is not None:
            export[role] = name
        elif name is not None:
            logger.warning("%s: its %s %r is no token of %s and is passed over", source, role, name, JSON)
    if config.get("padding_side"):
        export["padding_side"] = config["padding_side"]
    template = source / CHAT_TEMPLATE
    chat_template = read_text(template) if template.is_file() else config.get("chat_template")
    return export if chat_template is None else {**export, "chat_template": chat_template}


def _name(token: Any) -> str | None:
    """The text of a special token: itself, or the `content` of a mapping."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _read_settings(path: Path) -> dict[str, Any]:
    """The content of a settings file; empty where there is none."""
    settings = read_mapping(path) if path.is_file() else {}
    check_settings(path, settings)
    return settings
