"""Megatron-Core's layer specs of a model: which module stands where."""

from importlib.util import find_spec

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model.attention import FusedCoreAttention
from megatron_specialm.model.layers import FeedForward, TorchNorm
from megatron_specialm.model.moe import FeedForwardSpec, RoutedBuilder

CUDNN_DISABLED = (91000, 91001)  # versions whose fused attention Transformer Engine does not use, for their bugs


def use_transformer_engine(*, bf16: bool) -> bool:
    """Whether layers are Transformer Engine's: it is installed, there is a GPU, and the precision is not fp32, which it would
    compute in TF32 (a 10-bit mantissa)."""
    return HAVE_TE and torch.cuda.is_available() and bf16


def attends_to_packed_windows(*, grouped_queries: bool, head_size: int) -> bool:
    """Whether Transformer Engine's attention takes packed windows on this GPU: flash-attn's does on any. Its attention without
    a fused kernel never does.

    cuDNN's does from compute capability 9.0 on, from a version on that depends on the GPU, for head sizes that are a multiple
    of 8 and at most 128 (Transformer Engine, `nvte_get_fused_attn_backend`; larger sizes, which some GPUs allow, are left out).
    """
    if find_spec("flash_attn") is not None:
        return True
    capability, cudnn = torch.cuda.get_device_capability(), torch.backends.cudnn.version() or 0
    if capability < (9, 0) or head_size % 8 or head_size > 128 or cudnn in CUDNN_DISABLED:
        return False
    hopper = 90600 if grouped_queries else 90100
    return cudnn >= (91801 if capability >= (12, 0) else 90700 if capability >= (10, 0) else hopper)


def layer_specs(
    settings: TransformerConfig, vp_stage: int | None, config: ModelConfig, experts: RoutedBuilder
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layer specs of a chunk."""
    fused = use_transformer_engine(bf16=settings.bf16)
    dense = _layer(settings)
    if fused and config.moe is None:
        return dense
    first, count = get_transformer_layer_offset(settings, vp_stage), get_num_layers_to_build(settings, vp_stage)
    layers = []
    for number in range(first, first + count):
        layer, size = dense, config.experts_of(number)
        if config.moe is not None and size:
            layer = _layer(settings, experts=size)
            hidden = config.moe.ffn_hidden_size or config.ffn_hidden_size
            params = {"moe": config.moe, "experts": size, "ffn_hidden_size": hidden, "build": experts}
            layer.submodules.mlp = FeedForwardSpec(layer.submodules.mlp.submodules, params)
        layers.append(layer)
    norm = _layer(settings, experts=1).submodules.pre_mlp_layernorm  # Transformer Engine fuses a dense layer's
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _layer(settings: TransformerConfig, experts: int | None = None) -> ModuleSpec:
    """The spec of a layer. One with a number of experts has Megatron-Core's MoE layer."""
    if use_transformer_engine(bf16=settings.bf16):
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=settings.qk_layernorm
        )
        grouped, head_size = settings.num_query_groups != settings.num_attention_heads, settings.kv_channels
        if settings.context_parallel_size == 1 and not attends_to_packed_windows(
            grouped_queries=grouped, head_size=head_size
        ):
            layer.submodules.self_attention.submodules.core_attention = FusedCoreAttention
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=experts, normalization=settings.normalization, qk_layernorm=settings.qk_layernorm
        )
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = FusedCoreAttention
        norm = layer.submodules.input_layernorm
        if norm is WrappedTorchNorm or not torch.cuda.is_available():  # otherwise it is apex's fused norm
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchNorm
            if settings.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = TorchNorm
    if settings.recompute_granularity == "selective" and experts is None:
        layer.submodules.mlp.module = FeedForward
    return layer
