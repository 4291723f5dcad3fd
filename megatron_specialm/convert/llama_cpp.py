"""What llama.cpp's converter, `convert_hf_to_gguf.py`, makes of an export: the same model with the same ids, or nothing.

The converter has a reader of tokenizers for each architecture. For Llama's it reads a SentencePiece BPE model exactly, if
`tokenizer.model` is there and `tokenizer_config.json` says whether a text begins with a space. Without `tokenizer.model` it
would take `tokenizer.json` without scores, and for Qwen's architectures it always puts the space: other ids, and no error.
So `tokenizer.model` is written for Llama's only.
"""

from typing import Any

from sentencepiece import sentencepiece_model_pb2 as schema

from megatron_specialm.config.architectures import architecture_of
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.data.tokenizer import Tokenizer


def reads_sentencepiece(shape: ModelConfig) -> bool:
    """Whether the converter reads `tokenizer.model` of such a model as we do."""
    return architecture_of(shape) == "LlamaForCausalLM"


def normalizer(tokenizer: Tokenizer) -> Any:
    """How a SentencePiece BPE model changes a text before it encodes it; None for another tokenizer."""
    if tokenizer.sentencepiece is None:
        return None
    return schema.ModelProto.FromString(tokenizer.sentencepiece.read_bytes()).normalizer_spec


def refusal(shape: ModelConfig, tokenizer: Tokenizer) -> str | None:
    """Why the converter does not convert an export, or not to the same ids; None where it does."""
    if not reads_sentencepiece(shape):
        return f"it converts LlamaForCausalLM with this tokenizer, and this is {architecture_of(shape)}"
    changes = normalizer(tokenizer)
    if changes is None:
        return "its tokenizer is not SentencePiece BPE; llama.cpp knows others by a list of published ones"
    if changes.precompiled_charsmap or changes.remove_extra_whitespaces:
        return "its tokenizer normalizes text, and llama.cpp does not"
    return None
