"""Canonical weights to Hugging Face Transformers and back: GPT-NeoX for the family `neox`, Llama for `llama`, Qwen2-MoE for a
`llama` with MoE layers.

One table per family says where each weight goes; `N` stands for the layer and `E` for the expert. A row is of one of these
kinds:

    copy      the same tensor under another name
    qkv       linear_qkv packs, per query group, [query heads, key, value]: split into q_proj, k_proj and v_proj.
              (GPT-NeoX packs per head [query, key, value], which for one head per group is the same: a copy.)
    gate_up   linear_fc1 of a gated MLP stacks [gate; up]: split in two

A weight of all experts of a layer is (E, ...): each expert's part is split as its row says, under names with its number.
What the other architecture has and a model of ours has not is written as zeros, with which it computes the same.

Worked example, `llama` with H = 32, 4 heads in 2 groups, D = 8: linear_qkv.weight is (64, 32), its rows being
2 groups x (2 + 1 + 1) x 8; it becomes q_proj (32, 32), k_proj (16, 32), v_proj (16, 32).

Legend: B windows, T positions, V vocabulary.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, Qwen2MoeConfig

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.model import Activation, ModelConfig
from megatron_specialm.model.weights import weight_specs

Tensors = dict[str, torch.Tensor]

EMPTY_SHARED_EXPERT = (
    16  # the size of a shared expert of zeros; tensor parallelism over up to so many processes divides it
)
_ACTIVATIONS: dict[Activation, str] = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


class _Row(NamedTuple):
    """Where a weight goes. `experts`: of a weight of all experts of a layer their number, and each has names of its own."""

    ours: str
    theirs: tuple[str, ...]
    kind: str = "copy"
    experts: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of all experts, in their order."""
        if not self.experts:
            return self.theirs
        return tuple(name.replace(".E.", f".{expert}.") for expert in range(self.experts) for name in self.theirs)

    def split(self, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
        """Our weight as tensors under `names`."""
        parts = tensor.unbind() if self.experts else (tensor,)
        return [one for part in parts for one in _split(self.kind, part, config)]

    def join(self, tensors: list[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        """The inverse of `split`."""
        if not self.experts:
            return _join(self.kind, tensors, config)
        width = len(self.theirs)
        firsts = range(0, len(tensors), width)
        return torch.stack([_join(self.kind, tensors[first : first + width], config) for first in firsts])


def _copied(pairs: Mapping[str, str], *suffixes: str) -> list[_Row]:
    """Rows of kind `copy`, one for each pair and suffix."""
    return [_Row(f"{ours}.{end}", (f"{theirs}.{end}",)) for ours, theirs in pairs.items() for end in suffixes]


_NEOX = [
    _Row("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",)),
    *_copied(
        {
            "decoder.layers.N.input_layernorm": "gpt_neox.layers.N.input_layernorm",
            "decoder.layers.N.self_attention.linear_qkv": "gpt_neox.layers.N.attention.query_key_value",
            "decoder.layers.N.self_attention.linear_proj": "gpt_neox.layers.N.attention.dense",
            "decoder.layers.N.pre_mlp_layernorm": "gpt_neox.layers.N.post_attention_layernorm",
            "decoder.layers.N.mlp.linear_fc1": "gpt_neox.layers.N.mlp.dense_h_to_4h",
            "decoder.layers.N.mlp.linear_fc2": "gpt_neox.layers.N.mlp.dense_4h_to_h",
            "decoder.final_layernorm": "gpt_neox.final_layer_norm",
        },
        "weight",
        "bias",
    ),
    _Row("output_layer.weight", ("embed_out.weight",)),
]
_LLAMA = [
    _Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    *_copied(
        {
            "decoder.layers.N.input_layernorm": "model.layers.N.input_layernorm",
            "decoder.layers.N.self_attention.linear_proj": "model.layers.N.self_attn.o_proj",
            "decoder.layers.N.pre_mlp_layernorm": "model.layers.N.post_attention_layernorm",
            "decoder.layers.N.mlp.linear_fc2": "model.layers.N.mlp.down_proj",
            "decoder.final_layernorm": "model.norm",
        },
        "weight",
    ),
    _Row(
        "decoder.layers.N.self_attention.linear_qkv.weight",
        tuple(f"model.layers.N.self_attn.{part}_proj.weight" for part in "qkv"),
        "qkv",
    ),
    _Row(
        "decoder.layers.N.mlp.linear_fc1.weight",
        tuple(f"model.layers.N.mlp.{part}_proj.weight" for part in ("gate", "up")),
        "gate_up",
    ),
    _Row("decoder.layers.N.mlp.router.weight", ("model.layers.N.mlp.gate.weight",)),
    _Row(
        "decoder.layers.N.mlp.experts.linear_fc1.weight",
        tuple(f"model.layers.N.mlp.experts.E.{part}_proj.weight" for part in ("gate", "up")),
        "gate_up",
    ),
    _Row("decoder.layers.N.mlp.experts.linear_fc2.weight", ("model.layers.N.mlp.experts.E.down_proj.weight",)),
    _Row(
        "decoder.layers.N.mlp.shared_expert.linear_fc1.weight",
        tuple(f"model.layers.N.mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up")),
        "gate_up",
    ),
    _Row(
        "decoder.layers.N.mlp.shared_expert.linear_fc2.weight",
        ("model.layers.N.mlp.shared_expert.down_proj.weight",),
    ),
    _Row("decoder.layers.N.mlp.shared_expert_gate.weight", ("model.layers.N.mlp.shared_expert_gate.weight",)),
    _Row("output_layer.weight", ("lm_head.weight",)),
]


def to_huggingface(tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """Canonical weights under Transformers' names and in its layout.

    Raises:
        CheckpointError: naming a weight that is missing, has no place, or whose rows the heads do not divide.
    """
    return {**_converted(tensors, config, to_theirs=True), **_zeros(config)}


def from_huggingface(tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> Tensors:
    """The inverse of `to_huggingface`; the same errors, and one that names a weight that is not zero and that ours has not."""
    zeros = _zeros(config)
    if used := [name for name in zeros if name in tensors and tensors[name].any()]:
        raise CheckpointError(f"{used[0]} is not zero, and a model of ours has no such weight: it cannot be read")
    return _converted({name: tensors[name] for name in tensors if name not in zeros}, config, to_theirs=False)


def _converted(tensors: Mapping[str, torch.Tensor], config: ModelConfig, *, to_theirs: bool) -> Tensors:
    rest: Tensors = dict(tensors)
    result: Tensors = {}
    for row in _rows(config):
        names, others = ((row.ours,), row.names) if to_theirs else (row.names, (row.ours,))
        if missing := [name for name in names if name not in rest]:
            raise CheckpointError(f"{missing[0]} is missing: the checkpoint is of another model")
        parts = [rest.pop(name) for name in names]
        with _fitting(names[0], config):
            made = row.split(parts[0], config) if to_theirs else [row.join(parts, config)]
            result.update(zip(others, made, strict=True))
    if rest:
        raise CheckpointError(
            f"{sorted(rest)[0]} has no place ({len(rest)} left over): the checkpoint is of another model"
        )
    return result


def huggingface_config(
    config: ModelConfig, *, vocabulary_size: int, context_length: int, eod: int, pad: int | None = None
) -> PretrainedConfig:
    """The configuration with which Transformers computes what our model does. bos and eos are the end-of-document token; `pad`
    defaults to it too."""
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
        "pad_token_id": eod if pad is None else pad,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 1.0},
    }
    exported: PretrainedConfig
    if config.family == "llama":
        settings |= {
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_size,
            "rms_norm_eps": config.norm_epsilon,
            "hidden_act": "silu",
        }
        exported = _qwen2_moe(settings, config) if config.moe is not None else _llama(settings)
        rotary_before_5 = {"rope_theta": theta}
    else:
        settings |= {
            "architectures": ["GPTNeoXForCausalLM"],
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


def _llama(settings: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(**settings, architectures=["LlamaForCausalLM"], attention_bias=False, mlp_bias=False)


def _qwen2_moe(settings: dict[str, Any], config: ModelConfig) -> Qwen2MoeConfig:
    moe = config.moe
    assert moe is not None and config.export_refusal is None
    return Qwen2MoeConfig(
        **settings,
        architectures=["Qwen2MoeForCausalLM"],
        decoder_sparse_step=moe.every,
        mlp_only_layers=[],
        num_experts=moe.counts[0],
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=moe.top_k > 1,
        moe_intermediate_size=moe.ffn_hidden_size or config.ffn_hidden_size,
        shared_expert_intermediate_size=moe.shared_expert or EMPTY_SHARED_EXPERT,
        router_aux_loss_coef=moe.aux_loss,
        qkv_bias=True,
        use_sliding_window=False,
    )


def _rows(config: ModelConfig) -> list[_Row]:
    """The rows of the family's table for the weights that the model has, for each layer."""
    specs = weight_specs(config, vocabulary_size=1)
    rows: list[_Row] = []
    for row in _LLAMA if config.family == "llama" else _NEOX:
        for layer in range(config.layers) if ".N." in row.ours else [0]:
            ours, *theirs = (name.replace(".N.", f".{layer}.") for name in (row.ours, *row.theirs))
            if (spec := specs.get(ours)) is not None:
                rows.append(_Row(ours, tuple(theirs), row.kind, spec.shape[0] if spec.is_expert else 0))
    return rows


def _zeros(config: ModelConfig) -> Tensors:
    """The weights of Qwen2-MoE that a model of ours has not: biases of queries, keys and values, which vLLM's model always has,
    and a shared expert, which vLLM refuses in size 0 and Transformers would report as missing."""
    found: Tensors = {}
    if config.moe is None:
        return found
    heads = {"q": config.attention_heads, "k": config.kv_heads, "v": config.kv_heads}
    hidden, size = config.hidden_size, EMPTY_SHARED_EXPERT
    shared = {"gate_proj": (size, hidden), "up_proj": (size, hidden), "down_proj": (hidden, size)}
    for layer in range(config.layers):
        for part, count in heads.items():
            found[f"model.layers.{layer}.self_attn.{part}_proj.bias"] = torch.zeros(count * config.head_size)
        if config.experts_of(layer) and config.moe.shared_expert is None:
            place = f"model.layers.{layer}.mlp.shared_expert"
            found |= {f"{place}.{part}.weight": torch.zeros(shape) for part, shape in shared.items()}
            found[f"{place}_gate.weight"] = torch.zeros(1, hidden)
    return found


def _split(kind: str, tensor: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, ...]:
    if kind == "copy":
        return (tensor,)
    if kind == "gate_up":
        return tuple(part.contiguous() for part in tensor.chunk(2))
    heads = config.attention_heads // config.kv_heads
    grouped = tensor.unflatten(0, (config.kv_heads, heads + 2, config.head_size))
    return tuple(part.flatten(0, 2).contiguous() for part in grouped.split([heads, 1, 1], dim=1))


def _join(kind: str, tensors: list[torch.Tensor], config: ModelConfig) -> torch.Tensor:
    if kind == "copy":
        return tensors[0]
    if kind == "gate_up":
        return torch.cat(tensors)
    parts = [tensor.unflatten(0, (config.kv_heads, -1, config.head_size)) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 2)


@contextlib.contextmanager
def _fitting(name: str, config: ModelConfig) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        experts = f", or {config.moe.counts} experts" if config.moe is not None else ""
        raise CheckpointError(
            f"{name}: its shape does not fit {config.attention_heads} heads in {config.kv_heads} groups of size "
            f"{config.head_size}{experts} ({error}): the checkpoint is of another model"
        ) from None


@torch.no_grad()
def largest_logit_difference(folder: Path, tokens_BT: np.ndarray, logits_BTV: torch.Tensor) -> float:
    """The largest absolute difference, in fp32, between our logits and those of the folder, loaded as a user of Transformers
    loads it. NaN where either side's logits are: compare it with `not difference <= tolerance`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).float().eval()
    theirs_BTV = model(torch.from_numpy(tokens_BT)).logits
    return float((theirs_BTV - logits_BTV.float().cpu()).abs().max())
