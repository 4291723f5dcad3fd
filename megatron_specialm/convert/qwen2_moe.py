"""What Qwen2-MoE has and a model of ours may lack. It is written as zeros, with which Qwen2-MoE computes the same: biases of
queries, keys and values, which vLLM's model always has, and a shared expert, which vLLM refuses in size 0 and Transformers
would report as missing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_specialm.config.architectures import Model, architecture_of
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.lazy import LazyTensor

# The size of a shared expert of zeros; tensor parallelism over up to so many processes divides it.
EMPTY_SHARED_EXPERT = 16

Shapes = dict[str, tuple[int, ...]]


def zero_shapes(config: ModelConfig) -> Shapes:
    """The weights that are written as zeros; none for another architecture."""
    if config.moe is None or architecture_of(config) != "Qwen2MoeForCausalLM":
        return {}
    biases = {} if config.qkv_bias else _biases(config)
    return biases if config.moe.shared_expert is not None else {**biases, **_empty_shared_experts(config)}


def without_zeros(stored: Mapping[str, LazyTensor], model: Model) -> tuple[Model, list[str]]:
    """A model that was read from Qwen2-MoE's config.json without what is zero in its files, and the names of that."""
    shape: ModelConfig = model.shape
    zeros: list[str] = []
    if shape.moe is None:
        return model, zeros
    parts: list[tuple[Shapes, dict[str, Any]]] = []
    if shape.qkv_bias:
        parts.append((_biases(shape), {"qkv_bias": False}))
    if shape.moe.shared_expert == EMPTY_SHARED_EXPERT:
        bare = shape.moe.model_copy(update={"shared_expert": None})
        parts.append((_empty_shared_experts(shape), {"moe": bare}))
    for shapes, update in parts:
        if all(name in stored and not stored[name][()].any() for name in shapes):
            zeros += shapes
            shape = shape.model_copy(update=update)
    return replace(model, shape=shape), zeros


def counted_zeros(zeros: Sequence[str]) -> dict[str, str]:
    """What a source says of them."""
    reason = "biases and shared experts of Qwen2-MoE, which the model does not have"
    return {f"zeros ({len(zeros)})": reason} if zeros else {}


def _biases(config: ModelConfig) -> Shapes:
    heads = {"q": config.attention_heads, "k": config.kv_heads, "v": config.kv_heads}
    return {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": (count * config.head_size,)
        for layer in range(config.layers)
        for part, count in heads.items()
    }


def _empty_shared_experts(config: ModelConfig) -> Shapes:
    hidden, size = config.hidden_size, EMPTY_SHARED_EXPERT
    parts = {
        "shared_expert.gate_proj": (size, hidden),
        "shared_expert.up_proj": (size, hidden),
        "shared_expert.down_proj": (hidden, size),
        "shared_expert_gate": (1, hidden),
    }
    layers = [layer for layer in range(config.layers) if config.experts_of(layer)]
    return {f"model.layers.{layer}.mlp.{part}.weight": shape for layer in layers for part, shape in parts.items()}
