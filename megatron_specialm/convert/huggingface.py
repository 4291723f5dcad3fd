"""Canonical weights in memory to Hugging Face Transformers, by the tables of `families.py`, and the model's config.

Legend: B windows, T positions, V vocabulary.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.config.architectures import architecture_of, rotary_scaling
from megatron_specialm.config.model import Activation, ModelConfig
from megatron_specialm.convert.families import fitting, nothing_left, rows_in_files
from megatron_specialm.convert.qwen2_moe import EMPTY_SHARED_EXPERT, zero_shapes

Tensors = dict[str, torch.Tensor]

_ACTIVATIONS: dict[Activation, str] = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def to_huggingface(tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """Canonical weights under Transformers' names and in its layout.

    Raises:
        CheckpointError: naming a weight that is missing, has no place, or whose rows the heads do not divide.
    """
    rest = dict(tensors)
    result = {name: torch.zeros(shape) for name, shape in zero_shapes(config).items()}
    for row in rows_in_files(config):
        if row.ours not in rest:
            raise CheckpointError(f"{row.ours} is missing: the checkpoint is of another model")
        with fitting(row.ours, config):
            result.update(zip(row.names, row.split(rest.pop(row.ours), config), strict=True))
    nothing_left(rest)
    return result


def huggingface_config(
    config: ModelConfig, *, vocabulary_size: int, context_length: int, eod: int | None
) -> PretrainedConfig:
    """The configuration with which Transformers computes what our model does. bos, eos and pad are the end-of-document
    token, if it is known."""
    theta = float(config.rotary_base)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention_heads,
        "max_position_embeddings": context_length,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": eod,
        "eos_token_id": eod,
        "pad_token_id": eod,
        "rope_parameters": {"rope_theta": theta, "partial_rotary_factor": 1.0, **rotary_scaling(config)},
        "architectures": [architecture_of(config)],
    }
    exported: PretrainedConfig
    if config.family == "llama":
        settings |= {
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "rms_norm_eps": config.norm_epsilon,
            "hidden_act": "silu",
        }
        exported, rotary_before_5 = _GATED[architecture_of(config)](settings, config), {"rope_theta": theta}
    else:
        settings |= {
            "layer_norm_eps": config.norm_epsilon,
            "hidden_act": _ACTIVATIONS[config.activation],
            "use_parallel_residual": False,
            "attention_bias": True,
        }
        exported, rotary_before_5 = GPTNeoXConfig(**settings), {"rotary_emb_base": theta, "rotary_pct": 1.0}
    # Transformers 4 knows no `rope_parameters`: without its own names in config.json it would silently take defaults
    # (a quarter of the head, for GPT-NeoX). Transformers 5 drops them from its arguments, so they are set afterwards.
    for name, value in rotary_before_5.items():
        setattr(exported, name, value)
    return exported


def _experts(config: ModelConfig) -> dict[str, Any]:
    """What Qwen2-MoE and Qwen3-MoE say of experts."""
    moe = config.moe
    assert moe is not None
    return {
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": [],
        "num_experts": moe.counts[0],
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.top_k > 1,
        "moe_intermediate_size": moe.ffn_hidden_size or config.ffn_hidden_size,
        "router_aux_loss_coef": moe.aux_loss,
        "use_sliding_window": False,
    }


def _qwen2_moe(settings: dict[str, Any], config: ModelConfig) -> PretrainedConfig:
    assert config.moe is not None
    shared = config.moe.shared_expert or EMPTY_SHARED_EXPERT
    return Qwen2MoeConfig(**settings, **_experts(config), shared_expert_intermediate_size=shared, qkv_bias=True)


def _mixtral(settings: dict[str, Any], config: ModelConfig) -> PretrainedConfig:
    moe = config.moe
    assert moe is not None
    return MixtralConfig(
        **{**settings, "intermediate_size": moe.ffn_hidden_size or config.ffn_hidden_size},
        num_local_experts=moe.counts[0],
        num_experts_per_tok=moe.top_k,
        router_aux_loss_coef=moe.aux_loss,
        sliding_window=None,
    )


_GATED: dict[str, Callable[[dict[str, Any], ModelConfig], PretrainedConfig]] = {
    "LlamaForCausalLM": lambda settings, _: LlamaConfig(**settings, attention_bias=False, mlp_bias=False),
    "Qwen2ForCausalLM": lambda settings, _: Qwen2Config(**settings, use_sliding_window=False),
    "Qwen3ForCausalLM": lambda settings, _: Qwen3Config(**settings, use_sliding_window=False, attention_bias=False),
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": lambda settings, config: Qwen3MoeConfig(
        **settings, **_experts(config), attention_bias=False
    ),
    "MixtralForCausalLM": _mixtral,
}


def save_config(exported: PretrainedConfig, folder: Path) -> None:
    """Write config.json. Scaled rotary positions, and Qwen3-MoE's number of experts, stand in it under Transformers 4's names
    too."""
    exported.save_pretrained(folder)
    written = read_json(folder / "config.json", dict[str, Any])
    before_5 = {}
    scaling = {name: value for name, value in written["rope_parameters"].items() if name not in _NOT_SCALING}
    if scaling["rope_type"] != "default":
        before_5["rope_scaling"] = scaling
    if "num_local_experts" in written and "norm_topk_prob" in written:
        before_5["num_experts"] = written["num_local_experts"]
    write_json(folder / "config.json", {**written, **before_5})


_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


@torch.no_grad()
def largest_logit_difference(folder: Path, tokens_BT: np.ndarray, logits_BTV: torch.Tensor) -> float:
    """The largest absolute difference, in fp32, between our logits and those of the folder, loaded as a user of Transformers
    loads it. NaN where either side's logits are: compare it with `not difference <= tolerance`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).float().eval()
    theirs_BTV = model(torch.from_numpy(tokens_BT)).logits
    return float((theirs_BTV - logits_BTV.float().cpu()).abs().max())
