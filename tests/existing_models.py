"""A small model as users have it: weights that Transformers has made and saved, and a byte-level BPE tokenizer."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
)

from tests.texts import WORDS

END = "<|endoftext|>"
ROWS = 320  # of the embedding: more than the tokenizer has ids, as in most models
_SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(
        **_SIZES, tie_word_embeddings=False, rope_parameters={"rope_theta": 700.0, "rope_type": "default"}
    ),
    "qwen2": Qwen2Config(
        **_SIZES, tie_word_embeddings=True, rope_parameters={"rope_theta": 900.0, "rope_type": "default"}
    ),
}

CONFIGS["mixtral"] = MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)


def save_tokenizer(folder: Path, texts: Iterable[str], *, size: int = 300, start: str = END) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most `size` ids and save it. It puts `start`, if given, before each text, as Llama's does."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(dict.fromkeys((END, start)))
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if start != END:
        own = [(start, tokenizer.token_to_id(start))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{start} $A", special_tokens=own)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=END)
    wrapped.save_pretrained(folder)
    return wrapped


def _merges(folder: Path) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]]


def save_existing_model(folder: Path, family: str = "llama", *, start: str = END, **settings: Any) -> Path:
    """Save a random model with its tokenizer.

    Args:
        start: see `save_tokenizer`.
        settings: of `save_pretrained`.
    """
    tokenizer = save_tokenizer(folder, [" ".join(WORDS)] * 4, start=start)
    if family == "qwen2":  # its models are always loaded with this class
        tokenizer = Qwen2Tokenizer(vocab=tokenizer.get_vocab(), merges=_merges(folder))
        tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).float().eval()
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.save_pretrained(folder, **settings)
    return folder
