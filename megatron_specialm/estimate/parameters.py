"""Numbers of parameters of a model, by its shape."""

import math

from megatron_specialm.config.model import ModelConfig


def count_parameters(model: ModelConfig, vocabulary_size: int) -> int:
    """All parameters, as exported: one expert, no vocabulary padding, tied embeddings counted once."""
    hidden = model.hidden_size
    embeddings = vocabulary_size * hidden * (1 if model.tie_embeddings else 2)
    if model.family == "llama":
        attention = (model.qkv_size if model.qkv_bias else 0) + (2 * model.head_size if model.qk_norm else 0)
        norms_and_biases = model.layers * (2 * hidden + attention) + hidden
    else:
        norms_and_biases = model.layers * (model.qkv_size + model.ffn_hidden_size + 6 * hidden) + 2 * hidden
    return model.linear_parameters() + embeddings + norms_and_biases


def count_trained_parameters(model: ModelConfig, vocabulary_size: int) -> int:
    """The parameters that an optimizer step changes: of a projected network all its matrices, of LoRA the adapters."""
    if model.lora is not None:
        sizes = model.linear_sizes()
        return model.layers * sum(model.lora.rank * sum(sizes[name]) for name in model.lora.linears)
    if model.projection is None:
        return count_parameters(model, vocabulary_size)
    one = model.layers * feed_forward_parameters(model)
    shared = count_parameters(model, vocabulary_size) - one
    codes = model.projection.code_size * (model.projection.experts + model.layers * model.projection.capacity)
    return shared + model.projection.capacity * one + codes


def feed_forward_parameters(model: ModelConfig) -> int:
    """Parameters of one layer's feed-forward part: a projected network has `capacity` times as many."""
    sizes = model.linear_sizes()
    biases = sizes["fc1"][0] + sizes["fc2"][0] if model.family == "neox" else 0
    return math.prod(sizes["fc1"]) + math.prod(sizes["fc2"]) + biases
