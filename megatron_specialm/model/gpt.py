"""The one model: Megatron-Core's `GPTModel`, built from a `ModelConfig` through a layer spec.

The same definition runs on CPU and GPU. With Transformer Engine its fused layers are used; without it, Megatron-Core's
own with PyTorch's fused attention. Weights have canonical names and shapes whichever is used: those of the layers
without Transformer Engine, whole, without vocabulary padding, and without a second copy of tied embeddings.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model import cpu
from megatron_specialm.model.attention import FusedCoreAttention

VOCABULARY_MULTIPLE = 128  # rows of the embedding in memory: whole tiles for matrix kernels
EMBEDDINGS = ("embedding.word_embeddings.weight", "output_layer.weight")

# Transformer Engine fuses a norm into the linear behind it, and calls its parameters so.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def use_transformer_engine() -> bool:
    """Whether layers come from Transformer Engine: it is installed and there is a GPU for it."""
    return HAVE_TE and torch.cuda.is_available()


def transformer_config(config: ModelConfig, *, precision: str) -> TransformerConfig:
    """Megatron-Core's settings for a shape. Every fusion that needs a GPU kernel is off without one."""
    on_gpu = torch.cuda.is_available()
    llama = config.family == "llama"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.attention_heads,
        num_query_groups=config.kv_heads,
        normalization="RMSNorm" if llama else "LayerNorm",
        layernorm_epsilon=config.norm_epsilon,
        gated_linear_unit=llama,
        activation_func=functional.silu if llama else functional.gelu,
        add_bias_linear=not llama,
        add_qkv_bias=not llama,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Weights are drawn by name in `initialize`, on the CPU, so that they depend on neither device nor layout.
        use_cpu_initialization=True,
        # Losses are sums over tokens; gradients are divided once by the global number of tokens. Exact for any layout.
        calculate_per_token_loss=True,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        attention_softmax_in_fp32=True,
    )


def layer_spec(config: ModelConfig) -> ModuleSpec:
    """The modules of a layer."""
    if use_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm" if config.family == "llama" else "LayerNorm")
    spec.submodules.self_attention.submodules.core_attention = FusedCoreAttention
    return spec


def padded_vocabulary(vocabulary_size: int) -> int:
    """Rows of the embedding in memory. The padding never reaches a loss, a checkpoint or an export."""
    return math.ceil(vocabulary_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class LogitsModel(GPTModel):
    """A GPTModel that hands out its logits as they lie in memory, positions first.

    Asked for logits, Megatron-Core copies them to sequences first, and their gradient back: at a small model's size a
    fifth of a training step. Asked for a loss, it passes them to this method as they are.
    """

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(T, B, V) -> the same."""
        return logits


def build_model(config: ModelConfig, *, vocabulary_size: int, context_length: int, precision: str = "fp32") -> GPTModel:
    """A model on this process's device, its weights not yet meaningful (`initialize` or `load_weights` follows)."""
    cpu.install()
    model = LogitsModel(
        config=transformer_config(config, precision=precision),
        transformer_layer_spec=layer_spec(config),
        vocab_size=padded_vocabulary(vocabulary_size),
        max_sequence_length=context_length,
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope",
        rotary_percent=1.0,
        rotary_base=config.rotary_base,
    )
    return model.cuda() if torch.cuda.is_available() else model


def logits(model: torch.nn.Module, tokens_BT: torch.Tensor, *, vocabulary_size: int) -> torch.Tensor:
    """(B, T) token ids -> (B, T, V) logits over the real vocabulary: padding is cut off here, for all that follows.

    The result is a view with positions first in memory: reduce it in that order, or pay for a copy.
    """
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    logits_TBV = model(tokens_BT, positions_BT, None, labels=tokens_BT)
    return logits_TBV[..., :vocabulary_size].transpose(0, 1)


def canonical_name(name: str) -> str:
    """The canonical name of a model parameter, whichever implementation and wrapper it is in."""
    name = name.removeprefix("module.").removeprefix("module.")
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def named_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """All parameters under their canonical names, in the model's order."""
    for name, parameter in model.named_parameters():
        yield canonical_name(name), parameter


def unpad(name: str, tensor: torch.Tensor, *, vocabulary_size: int) -> torch.Tensor:
    """A weight, or anything of its shape, as it goes to disk: embeddings without their padding rows."""
    return tensor[:vocabulary_size] if name in EMBEDDINGS else tensor


@torch.no_grad()
def initialize(model: torch.nn.Module, config: ModelConfig, *, vocabulary_size: int, seed: int) -> None:
    """Draw first weights: N(0, init_std), projections back into the residual stream N(0, init_std / sqrt(2 L)), biases
    and padding 0, norms 1. Each weight is drawn from a generator of (seed, its name): no layout changes it."""

    def draw(name: str, parameter: torch.Tensor) -> torch.Tensor:
        if "layernorm" in name:
            return torch.ones(parameter.shape) if name.endswith("weight") else torch.zeros(parameter.shape)
        if name.endswith("bias"):
            return torch.zeros(parameter.shape)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) % 2**63)
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = config.init_std / math.sqrt(2 * config.layers) if residual else config.init_std
        return torch.randn(unpad(name, parameter, vocabulary_size=vocabulary_size).shape, generator=generator) * std

    _fill(model, draw, vocabulary_size=vocabulary_size)


@torch.no_grad()
def load_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, vocabulary_size: int) -> None:
    """Fill the model from canonical tensors.

    Raises:
        CheckpointError: naming a weight that is missing, left over, or of another shape.
    """
    expected = {name for name, _ in named_weights(model)}
    if missing := sorted(expected - set(tensors)):
        raise CheckpointError(f"the checkpoint lacks {missing[0]} ({len(missing)} missing): it is of another model")
    if unused := sorted(set(tensors) - expected):
        raise CheckpointError(f"the model has no place for {unused[0]} ({len(unused)} unused): it is of another model")

    def take(name: str, parameter: torch.Tensor) -> torch.Tensor:
        wanted = unpad(name, parameter, vocabulary_size=vocabulary_size).shape
        if tensors[name].shape != wanted:
            raise CheckpointError(
                f"{name}: the checkpoint has shape {tuple(tensors[name].shape)}, the model {tuple(wanted)}: "
                "model preset and tokenizer must be those it was trained with"
            )
        return tensors[name]

    _fill(model, take, vocabulary_size=vocabulary_size)


def _fill(model: torch.nn.Module, value: Callable[[str, torch.Tensor], torch.Tensor], *, vocabulary_size: int) -> None:
    for name, parameter in named_weights(model):
        parameter.zero_()
        unpad(name, parameter, vocabulary_size=vocabulary_size).copy_(value(name, parameter))
