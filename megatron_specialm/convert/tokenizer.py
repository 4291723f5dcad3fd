"""Writing a tokenizer that `transformers.AutoTokenizer` loads, and comparing it with the one that the model is trained with."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_specialm.base.files import write_json, write_text
from megatron_specialm.convert.llama_cpp import normalizer
from megatron_specialm.convert.tokenizer_files import SENTENCEPIECE
from megatron_specialm.data.huggingface_tokenizer import CONFIG, JSON
from megatron_specialm.data.tokenizer import Tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, context_length: int, sentencepiece: bool = True) -> None:
    """Write the files with which Transformers makes the same ids, after the start token that begins each text, as in
    training: programs that score text with Transformers' tokenizer then score as we do.

    Args:
        context_length: of the model, in tokens; `truncation=True` cuts texts to it.
        sentencepiece: write `tokenizer.model` too, of a SentencePiece BPE model, for llama.cpp (`convert/llama_cpp.py`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = json.loads((tokenizer.folder / JSON).read_text(encoding="utf-8"))
    description["post_processor"] = _start(tokenizer.special_tokens["bos_token"], tokenizer.bos)
    write_text(folder / JSON, json.dumps(description, ensure_ascii=False, indent=2))
    changes = normalizer(tokenizer)
    # Transformers follows tokenizer.json; llama.cpp would put a space before each text.
    prefix = {} if changes is None or changes.add_dummy_prefix else {"add_prefix_space": False}
    if sentencepiece and tokenizer.sentencepiece is not None:
        shutil.copyfile(tokenizer.sentencepiece, folder / SENTENCEPIECE)
    write_json(
        folder / CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "left",  # so that `generate` goes on where the texts of a batch end
            **tokenizer.special_tokens,
            "model_max_length": context_length,
            "model_input_names": ["input_ids", "attention_mask"],  # the models take no others
            "split_special_tokens": True,  # text that spells a special token stays text
            "clean_up_tokenization_spaces": False,
            **prefix,
        },
    )


def _start(token: str, number: int) -> dict[str, Any]:
    """The post-processor of tokenizer.json that puts a token before a text, and before each of a pair."""
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, start, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, loaded as a user of Transformers loads it."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def disagreement(folder: Path, tokenizer: Tokenizer, *, context_length: int, texts: Iterable[str] = ()) -> str | None:
    """The first difference between Transformers with this folder and our tokenizer: in the ids of `texts` and of the
    tokenizer's probes, which the start token must begin, or in a padded and truncated batch. None where they agree."""
    theirs = load_tokenizer(folder)
    for text in (*texts, *tokenizer.probes()):
        ids = [tokenizer.bos, *tokenizer.encode([text])[0].tolist()]
        if theirs(text, truncation=False, verbose=False).input_ids != ids:
            return f"gives other ids than tokenizers, for instance of {text[:80]!r}"
    long = "".join(tokenizer.probes()) * context_length
    batch = theirs([long, "a"], padding=True, truncation=True)
    if set(batch) != {"input_ids", "attention_mask"}:
        return f"makes batches of {', '.join(batch)}"
    wanted = min(context_length, 1 + len(tokenizer.encode([long])[0]))
    if {len(row) for row in batch.input_ids} != {wanted}:
        return (
            f"cuts texts to {', '.join(str(len(row)) for row in batch.input_ids)} ids for a context of {context_length}"
        )
    ids, masks = batch.input_ids[1], batch.attention_mask[1]
    filling = {number for number, counts in zip(ids, masks, strict=True) if not counts}
    return None if filling <= {tokenizer.pad} else f"fills batches with {filling}, not with {tokenizer.pad}"
