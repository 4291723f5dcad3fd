"""Floating-point operations of a model and of passes through it, a multiply-add being 2.

Legend: L layers, A attention heads of size D, V vocabulary, T context length.
"""

from collections.abc import Iterable

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.estimate.parameters import feed_forward_parameters

TYPICAL_UTILISATION = 0.4  # MFU that others publish for models of this size; every training logs its own


def forward_flops(model: ModelConfig, vocabulary_size: int, context_length: int) -> int:
    """FLOPs of one token's forward pass.

    Linears and the output layer 2 per weight, of an MoE those of the experts that a token is routed to; attention
    2 * L * A * D * T, in a window that is padded to T. Norms, activations, softmax and recomputation are not counted. (So MFU
    is lower here than where the masked half of attention is counted too.)
    """
    linears = 2 * (model.linear_parameters(active=True) + vocabulary_size * model.hidden_size)
    return linears + attention_flops(model, context_length)


def attention_flops(model: ModelConfig, keys: int) -> int:
    """FLOPs of attention in all layers, forward: scores and weighted sum over half of the keys, as a causal mask leaves them.

    Args:
        keys: T for a token of a window of T; or the sum over tokens.
    """
    return 2 * model.layers * model.attention_size * keys


def keys_saved(lengths: Iterable[int], context_length: int) -> int:
    """The keys that attention does not read because windows, with their padding, have these lengths and not T: a token of a
    window of length t reads t keys, or T - t less. (The causal half of each is taken off in `reading_flops`.)"""
    return sum(length * (context_length - length) for length in lengths)


def reading_flops(model: ModelConfig, vocabulary_size: int, context_length: int, *, slots: int, saved: int = 0) -> int:
    """FLOPs of the forward passes of so many slots.

    Args:
        saved: their `keys_saved`; 0 if all windows are padded to T.
    """
    whole = slots * forward_flops(model, vocabulary_size, context_length)
    return whole - attention_flops(model, saved)


def training_flops(model: ModelConfig, vocabulary_size: int, context_length: int) -> int:
    """FLOPs of one token's forward and backward pass: three forward passes."""
    return 3 * forward_flops(model, vocabulary_size, context_length)


def projection_flops(model: ModelConfig, variants: int, *, forward_only: bool = False) -> int:
    """FLOPs of a projected network in addition to the model's own, to combine so many experts from `capacity` matrices each.
    The backward pass, for the gradients of matrices and coefficients, costs twice the forward pass."""
    assert model.projection is not None
    forward = 2 * variants * model.projection.capacity * model.layers * feed_forward_parameters(model)
    return forward if forward_only else 3 * forward


def device_hours(flops: float, dense_peak: float) -> float:
    """Device-hours of so many FLOPs at `TYPICAL_UTILISATION` of this peak (FLOP/s)."""
    return flops / (TYPICAL_UTILISATION * dense_peak) / 3600
