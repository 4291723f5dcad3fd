"""What llama.cpp's converter, `convert_hf_to_gguf.py`, makes of an export: the same model with the same ids, or nothing.

The converter has a reader of tokenizers for each architecture. For Llama and Mixtral it reads SentencePiece BPE exactly, if
`tokenizer.model` is there and `tokenizer_config.json` says whether a text begins with a space. Without `tokenizer.model` it
would take `tokenizer.json` without scores, and for Qwen's architectures it always puts the space: other ids, and no error. So
`tokenizer.model` is written for Llama and Mixtral only.

Byte-level BPE it recognizes by a list of hashes: of the ids of a text under the tokenizers of published models. The start token
that our exports put before a text changes them.
"""

from typing import Any

from sentencepiece import sentencepiece_model_pb2 as schema

from megatron_specialm.base.files import read_json
from megatron_specialm.config.architectures import architecture_of
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.data.huggingface_tokenizer import JSON
from megatron_specialm.data.tokenizer import Tokenizer

CONVERTER = "`convert_hf_to_gguf.py`"
_READS_SENTENCEPIECE = ("LlamaForCausalLM", "MixtralForCausalLM")
_READS_BYTE_LEVEL = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def reads_sentencepiece(shape: ModelConfig) -> bool:
    """Whether the converter reads `tokenizer.model` of such a model as we do."""
    return architecture_of(shape) in _READS_SENTENCEPIECE


def normalizer(tokenizer: Tokenizer) -> Any:
    """How a SentencePiece BPE model changes a text before it encodes it; None for another tokenizer."""
    if tokenizer.sentencepiece is None:
        return None
    return schema.ModelProto.FromString(tokenizer.sentencepiece.read_bytes()).normalizer_spec


def advice(shape: ModelConfig, tokenizer: Tokenizer) -> str:
    """How an export is converted, or why it is not: a sentence of the model card."""
    changes, architecture = normalizer(tokenizer), architecture_of(shape)
    if changes is None and _is_byte_level(tokenizer) and architecture in _READS_BYTE_LEVEL:
        return (
            f"{CONVERTER} recognizes a published model's tokenizer, in a copy of this folder whose `tokenizer.json` has "
            '`"post_processor": null` and whose `tokenizer_config.json` has `"add_bos_token": true`.'
        )
    if changes is None:
        return f"{CONVERTER} does not convert it: of tokenizers of one's own it reads SentencePiece BPE only."
    if not reads_sentencepiece(shape):
        known = " and ".join(_READS_SENTENCEPIECE)
        return f"{CONVERTER} does not convert it: it reads this tokenizer for {known}, and this is {architecture}."
    if changes.precompiled_charsmap or changes.remove_extra_whitespaces:
        return f"{CONVERTER} does not convert it: the tokenizer normalizes text, which llama.cpp does not."
    return f"{CONVERTER} converts this folder, tokenizer included."


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    model = read_json(tokenizer.folder / JSON, dict[str, Any])["model"]
    return model.get("type") == "BPE" and not model.get("byte_fallback")
