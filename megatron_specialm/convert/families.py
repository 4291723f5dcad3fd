"""Where each canonical weight stands in Hugging Face Transformers: one table per family.

`N` stands for the layer and `E` for the expert. A row is of one of three kinds:

    copy      the same tensor under another name
    qkv       linear_qkv packs, per query group, [query heads, key, value]: split into q_proj, k_proj and v_proj.
              (GPT-NeoX packs per head [query, key, value], which for one head per group is the same: a copy.)
    gate_up   linear_fc1 of a gated MLP stacks [gate; up]: split in two

A weight of all experts of a layer is (E, ...): each expert's part is split as its row says, under names with its number.
Experts have the names of Qwen2-MoE's files here; `expert_names.py` has Mixtral's and others.

Worked example, `llama` with H = 32, 4 heads in 2 groups, D = 8: linear_qkv.weight is (64, 32), its rows being
2 groups x (2 + 1 + 1) x 8; it becomes q_proj (32, 32), k_proj (16, 32), v_proj (16, 32).
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.architectures import architecture_of
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.expert_names import fused_name, mixtral_name, table_names
from megatron_specialm.convert.lazy import Computed, LazyTensor, filled, part
from megatron_specialm.model.weights import OUTPUT_LAYER, WORD_EMBEDDINGS, weight_specs


class Row(NamedTuple):
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

    def split(self, tensor: torch.Tensor, config: ModelConfig) -> Iterator[torch.Tensor]:
        """Our weight as tensors under `names`, one expert after the other."""
        for one in tensor.unbind() if self.experts else (tensor,):
            yield from _split(self.kind, one, config)

    def join(self, tensors: Sequence[LazyTensor], config: ModelConfig) -> torch.Tensor:
        """The inverse of `split`. Of experts the tensors of one at a time are read."""
        if not self.experts:
            return _join(self.kind, [one[()] for one in tensors], config)
        width = len(self.theirs)
        groups = [tensors[first : first + width] for first in range(0, len(tensors), width)]
        return filled((_join(self.kind, [one[()] for one in own], config) for own in groups), len(groups))


def _split(kind: str, tensor: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, ...]:
    if kind == "copy":
        return (tensor,)
    if kind == "gate_up":
        return tuple(part.contiguous() for part in tensor.chunk(2))
    heads = config.attention_heads // config.kv_heads
    grouped = tensor.unflatten(0, (config.kv_heads, heads + 2, config.head_size))
    return tuple(part.flatten(0, 2).contiguous() for part in grouped.split([heads, 1, 1], dim=1))


def _join(kind: str, tensors: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
    if kind == "copy":
        return tensors[0]
    if kind == "gate_up":
        return torch.cat(list(tensors))
    parts = [tensor.unflatten(0, (config.kv_heads, -1, config.head_size)) for tensor in tensors]
    return torch.cat(parts, dim=1).flatten(0, 2)


def _copied(pairs: Mapping[str, str], *suffixes: str) -> list[Row]:
    """Rows of kind `copy`, one for each pair and suffix."""
    return [Row(f"{ours}.{end}", (f"{theirs}.{end}",)) for ours, theirs in pairs.items() for end in suffixes]


_NEOX = [
    Row(WORD_EMBEDDINGS, ("gpt_neox.embed_in.weight",)),
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
    Row(OUTPUT_LAYER, ("embed_out.weight",)),
]
_LLAMA = [
    Row(WORD_EMBEDDINGS, ("model.embed_tokens.weight",)),
    *_copied(
        {
            "decoder.layers.N.input_layernorm": "model.layers.N.input_layernorm",
            "decoder.layers.N.self_attention.q_layernorm": "model.layers.N.self_attn.q_norm",
            "decoder.layers.N.self_attention.k_layernorm": "model.layers.N.self_attn.k_norm",
            "decoder.layers.N.self_attention.linear_proj": "model.layers.N.self_attn.o_proj",
            "decoder.layers.N.pre_mlp_layernorm": "model.layers.N.post_attention_layernorm",
            "decoder.layers.N.mlp.linear_fc2": "model.layers.N.mlp.down_proj",
            "decoder.final_layernorm": "model.norm",
        },
        "weight",
    ),
    *(
        Row(
            f"decoder.layers.N.self_attention.linear_qkv.{end}",
            tuple(f"model.layers.N.self_attn.{part}_proj.{end}" for part in "qkv"),
            "qkv",
        )
        for end in ("weight", "bias")
    ),
    Row(
        "decoder.layers.N.mlp.linear_fc1.weight",
        tuple(f"model.layers.N.mlp.{part}_proj.weight" for part in ("gate", "up")),
        "gate_up",
    ),
    Row("decoder.layers.N.mlp.router.weight", ("model.layers.N.mlp.gate.weight",)),
    *(
        Row(
            f"decoder.layers.N.mlp.{ours}.linear_{end}.weight",
            tuple(f"model.layers.N.mlp.{theirs}.{part}_proj.weight" for part in parts),
            kind,
        )
        for ours, theirs in (("experts", "experts.E"), ("shared_expert", "shared_expert"))
        for end, parts, kind in (("fc1", ("gate", "up"), "gate_up"), ("fc2", ("down",), "copy"))
    ),
    Row("decoder.layers.N.mlp.shared_expert_gate.weight", ("model.layers.N.mlp.shared_expert_gate.weight",)),
    Row(OUTPUT_LAYER, ("lm_head.weight",)),
]

# Buffers that earlier versions of Transformers saved: they follow from the config.
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)")


def rows(config: ModelConfig, *, rename: Callable[[str], str] = str) -> list[Row]:
    """The rows of the family's table for the weights that the model has, for each layer.

    Args:
        rename: makes another name of each of theirs.
    """
    specs = weight_specs(config, vocabulary_size=1)
    found = []
    for row in _LLAMA if config.family == "llama" else _NEOX:
        for layer in range(config.layers) if ".N." in row.ours else [0]:
            ours, *theirs = (name.replace(".N.", f".{layer}.") for name in (row.ours, *row.theirs))
            if (spec := specs.get(ours)) is not None:
                names = tuple(map(rename, theirs))
                found.append(Row(ours, names, row.kind, spec.shape[0] if spec.is_expert else 0))
    return found


def rows_in_files(config: ModelConfig) -> list[Row]:
    """The rows with the names that Transformers gives weights in files.

    Raises:
        CheckpointError: Transformers has no such architecture.
    """
    return rows(config, rename=mixtral_name if architecture_of(config) == "MixtralForCausalLM" else str)


def is_buffer(name: str) -> bool:
    """Whether a tensor of a Transformers model is no weight, and is left out on purpose."""
    return _BUFFERS.fullmatch(name) is not None


def huggingface_shapes(row: Row, config: ModelConfig, *, vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of a row's tensors in Transformers."""
    shape = weight_specs(config, vocabulary_size=vocabulary_size)[row.ours].shape
    parts = row.split(torch.empty(shape, device="meta"), config)
    return {name: tuple(part.shape) for name, part in zip(row.names, parts, strict=True)}


def from_huggingface_lazily(
    stored: Mapping[str, LazyTensor], config: ModelConfig, *, vocabulary_size: int, where: Path
) -> dict[str, LazyTensor]:
    """Transformers' weights as canonical ones, each computed when it is read. Every stored tensor is in exactly one.

    Args:
        where: the folder, for messages.

    Raises:
        CheckpointError: naming a weight that is missing, has no place or is of another shape.
    """
    rest, found = table_names(stored), {}
    in_file = mixtral_name if any(".block_sparse_moe." in name for name in stored) else str
    specs = weight_specs(config, vocabulary_size=vocabulary_size)
    for row in rows(config):
        for name, shape in huggingface_shapes(row, config, vocabulary_size=vocabulary_size).items():
            if name not in rest:
                raise CheckpointError(
                    f"{where}: {in_file(name)} is missing: the checkpoint is not complete, or of another model"
                )
            if tuple(rest[name].shape) != shape:
                raise CheckpointError(
                    f"{where}: {in_file(name)} has shape {tuple(rest[name].shape)}, and the config makes it {shape}: the "
                    "checkpoint is of another model than its config"
                )
        parts = [rest.pop(name) for name in row.names]
        is_copy = row.kind == "copy" and not row.experts
        found[row.ours] = parts[0] if is_copy else _joined(row, parts, config, specs[row.ours].shape)
    nothing_left({in_file(name): tensor for name, tensor in rest.items()}, where=where)
    return {name: found[name] for name in specs}


def to_huggingface_lazily(
    weights: Mapping[str, LazyTensor],
    config: ModelConfig,
    *,
    vocabulary_size: int,
) -> dict[str, LazyTensor]:
    """The inverse of `from_huggingface_lazily`."""
    found: dict[str, LazyTensor] = {}
    for row in rows(config):
        whole = weights[row.ours]
        for number, (name, shape) in enumerate(
            huggingface_shapes(row, config, vocabulary_size=vocabulary_size).items()
        ):
            found[name] = whole if row.kind == "copy" and not row.experts else _piece(row, whole, config, number, shape)
    return found


def to_modules_lazily(
    weights: Mapping[str, LazyTensor], config: ModelConfig, *, vocabulary_size: int
) -> dict[str, LazyTensor]:
    """Canonical weights by the names of modules of Transformers 5, in which all experts of a layer are one tensor."""
    found = to_huggingface_lazily(weights, config, vocabulary_size=vocabulary_size)
    for row in rows(config):
        if row.experts:
            found = {name: tensor for name, tensor in found.items() if name not in row.names}
            found[fused_name(row.theirs[0])] = weights[row.ours]
    return found


def _piece(row: Row, whole: LazyTensor, config: ModelConfig, number: int, shape: tuple[int, ...]) -> LazyTensor:
    expert, place = divmod(number, len(row.theirs))
    own = part(whole, expert) if row.experts else whole
    return Computed(shape, whole.dtype, lambda: _split(row.kind, own[()], config)[place])


def _joined(row: Row, parts: Sequence[LazyTensor], config: ModelConfig, shape: tuple[int, ...]) -> LazyTensor:
    return Computed(shape, parts[0].dtype, lambda: row.join(parts, config))


@contextlib.contextmanager
def fitting(name: str, config: ModelConfig) -> Iterator[None]:
    """Raise an error of splitting or joining as one that names the weight."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        experts = f", or {config.moe.counts} experts" if config.moe is not None else ""
        raise CheckpointError(
            f"{name}: its shape does not fit {config.attention_heads} heads in {config.kv_heads} groups of size "
            f"{config.head_size}{experts} ({error}): the checkpoint is of another model"
        ) from None


def nothing_left(rest: Mapping[str, object], *, where: Path | None = None) -> None:
    """Refuse tensors that no row has taken."""
    if rest:
        place = "" if where is None else f"{where}: "
        raise CheckpointError(
            f"{place}{sorted(rest)[0]} has no place ({len(rest)} left over): the checkpoint is of another model"
        )
