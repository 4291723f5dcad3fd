"""Numbers of parameters of a model, by its shape."""

import math

from megatron_specialm.config.model import ModelConfig


def count_parameters(model: ModelConfig, vocabulary_size: int, *, active: bool = False) -> int:
    """All parameters, as exported: no vocabulary padding, tied embeddings counted once; of a projected network, one expert.

    Args:
        active: of an MoE's experts, only as many as compute a token.
    """
    hidden = model.hidden_size
    embeddings = vocabulary_size * hidden * (1 if model.tie_embeddings else 2)
    norms_and_biases = sum(layer_norms_and_biases(model, layer, active=active) for layer in range(model.layers))
    final_norm = hidden * (1 if model.family == "llama" else 2)
    return model.linear_parameters(active=active) + embeddings + norms_and_biases + final_norm


def layer_norms_and_biases(model: ModelConfig, layer: int, *, active: bool = False) -> int:
    """Parameters of a layer, counted from 0, beside the weights of its linears."""
    hidden = model.hidden_size
    mixing = 2 if model.moe is not None and model.experts_of(layer) and model.moe.residual else 0  # its bias
    if model.family == "llama":
        attention = model.qkv_bias * model.qkv_size + model.qk_norm * 2 * model.head_size
        return 2 * hidden + attention + mixing
    parts = model.feed_forward_parts(layer)
    biases = sum((part.ffn_hidden_size + hidden) * (part.active if active else part.count) for part in parts)
    return model.qkv_size + 5 * hidden + biases + mixing


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
