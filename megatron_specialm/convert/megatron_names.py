"""Megatron's names for canonical weights, and the settings of Megatron-LM that describe a model.

Canonical names are those of Megatron-Core's own layers. A checkpoint differs from them in a few ways:

    decoder.layers.0.self_attention.linear_qkv.layer_norm_weight   Transformer Engine's name of the norm before a linear
    decoder.layers.self_attention.linear_qkv.weight (L, ...)       all layers in one tensor
    decoder.layers.0.mlp.linear_fc1.weight_w, _v                   gate and up projection apart
    embedding.word_embeddings.weight                               rows of padding at its end
    ..._extra_state                                                FP8 scales of Transformer Engine: no weights

`megatron_moe.py` has the names of experts.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.architectures import Model
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.families import nothing_left
from megatron_specialm.convert.lazy import Computed, LazyTensor, agreed, part, with_rows
from megatron_specialm.convert.megatron_moe import experts_settings, joined_experts, read_experts
from megatron_specialm.model.weights import FUSED_NORMS, OUTPUT_LAYER, WORD_EMBEDDINGS, WeightSpec, weight_specs

VOCABULARY_MULTIPLE = 128  # Megatron-LM's default, for each tensor-parallel rank
EXTRA_STATE = "_extra_state"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_GATES = re.compile(r"(.+\.linear_fc1\.weight)_([wv])")


def padded_rows(vocabulary_size: int, *, tensor_parallel: int) -> int:
    """Rows of Megatron-LM's embedding."""
    multiple = VOCABULARY_MULTIPLE * tensor_parallel
    return -(-vocabulary_size // multiple) * multiple


def megatron_name(name: str, shape: ModelConfig) -> str:
    """The name of a canonical weight in Megatron's checkpoints, which have Transformer Engine's names of norms: that before
    experts is a module of its own."""
    layer = _LAYER.match(name)
    for fused, plain in FUSED_NORMS.items():
        if not (layer and fused.startswith("mlp.") and shape.experts_of(int(layer[1]))):
            name = name.replace(f".{plain}", f".{fused}")
    return name


def from_megatron(stored: Mapping[str, LazyTensor], model: Model, *, where: Path) -> dict[str, LazyTensor]:
    """Megatron-Core's tensors, with their full shapes, as canonical weights. Every stored tensor is in exactly one.

    Raises:
        CheckpointError: naming a weight that is missing, there twice, of another shape, or without a place.
    """
    specs = weight_specs(model.shape, vocabulary_size=model.vocabulary_size)
    rest = joined_experts(_apart(stored, model.shape, where), model.shape, where)
    found: dict[str, LazyTensor] = {}
    for name, spec in specs.items():
        if name not in rest:
            missing = [one for one in specs if one not in rest and one not in found]
            raise CheckpointError(
                f"{where}: {name} is missing ({len(missing)} such): the checkpoint is not complete, or of another model"
            )
        tensor = rest.pop(name)
        if name in (WORD_EMBEDDINGS, OUTPUT_LAYER) and tensor.shape[0] > spec.shape[0]:
            tensor = with_rows(tensor, spec.shape[0])
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, and the settings make it {spec.shape}: they are of another "
                "model"
            )
        found[name] = tensor
    nothing_left(rest, where=where)
    return found


def canonical_names(stored: Mapping[str, LazyTensor], where: Path) -> dict[str, LazyTensor]:
    """Tensors under canonical names of norms; other names stay.

    Raises:
        CheckpointError: two have the same.
    """
    found: dict[str, LazyTensor] = {}
    for theirs, tensor in stored.items():
        name = theirs
        for fused, plain in FUSED_NORMS.items():
            name = name.replace(fused, plain)
        if name in found:
            raise CheckpointError(f"{where}: {name} is there twice: under names of two kinds")
        found[name] = tensor
    return found


def _apart(stored: Mapping[str, LazyTensor], shape: ModelConfig, where: Path) -> dict[str, LazyTensor]:
    """A tensor per weight and layer, under canonical names."""
    found: dict[str, LazyTensor] = {}
    halves: dict[str, dict[str, LazyTensor]] = {}
    for theirs, tensor in canonical_names(stored, where).items():
        for name, one in _layers(theirs, tensor, shape, where):
            if gate := _GATES.fullmatch(name):
                halves.setdefault(gate[1], {})[gate[2]] = one
            elif name in found:
                raise CheckpointError(f"{where}: {name} is there twice: under names of two kinds")
            else:
                found[name] = one
    for name, pair in halves.items():
        if pair.keys() != {"w", "v"} or name in found:
            raise CheckpointError(f"{where}: {name}_w and {name}_v are not both there, or it is there whole too")
        found[name] = _gate_up(pair["w"], pair["v"])
    return found


def _layers(name: str, tensor: LazyTensor, shape: ModelConfig, where: Path) -> Iterator[tuple[str, LazyTensor]]:
    match = _STACKED.fullmatch(name)
    if match is None:
        yield name, tensor
        return
    if tensor.shape[0] != shape.layers:
        raise CheckpointError(f"{where}: {name} has {tensor.shape[0]} layers, and the settings say {shape.layers}")
    for layer in range(shape.layers):
        yield f"decoder.layers.{layer}.{match[1]}", part(tensor, layer)


def _gate_up(gate: LazyTensor, up: LazyTensor) -> LazyTensor:
    rows = gate.shape[0] + up.shape[0]
    return Computed((rows, *gate.shape[1:]), gate.dtype, lambda: torch.cat([gate[()], up[()]]))


def joined_ranks(parts: list[LazyTensor], spec: WeightSpec | None, *, name: str, where: Path) -> LazyTensor:
    """The tensor that tensor-parallel ranks hold parts of; or that each of them holds whole (see `agreed`).

    Args:
        name: of the tensor, and `where` it is, for messages.
    """
    if spec is None or spec.cut is None:
        return agreed({f"tensor-parallel rank {rank}": one for rank, one in enumerate(parts)}, name, where)
    if len(parts) == 1:
        return parts[0]
    cut, blocks = spec.cut, spec.blocks
    shape = list(parts[0].shape)
    shape[cut] = sum(part.shape[cut] for part in parts)

    def compute() -> torch.Tensor:
        # Each rank holds its part of each block: [gate_r; up_r]. The whole tensor is [all gates; all ups].
        chunks = [part[()].chunk(blocks, dim=cut) for part in parts]
        return torch.cat([rank[block] for block in range(blocks) for rank in chunks], dim=cut)

    return Computed(tuple(shape), parts[0].dtype, compute)


def rank_part(tensor: LazyTensor, spec: WeightSpec, *, rank: int, size: int) -> LazyTensor:
    """What a tensor-parallel rank holds: the inverse of `joined_ranks`."""
    if spec.cut is None or size == 1:
        return tensor
    cut, blocks = spec.cut, spec.blocks
    shape = list(tensor.shape)
    width = shape[cut] // (blocks * size)
    shape[cut] //= size

    def compute() -> torch.Tensor:
        starts = [(block * size + rank) * width for block in range(blocks)]
        before = (slice(None),) * cut
        return torch.cat([tensor[(*before, slice(start, start + width))] for start in starts], dim=cut)

    return Computed(tuple(shape), tensor.dtype, compute)


def read_settings(settings: Mapping[str, Any], *, where: Path, rows: int) -> Model:
    """The model that Megatron-LM's settings describe.

    Args:
        rows: of the embedding in the checkpoint, padding included: the vocabulary's size where the settings say none.

    Raises:
        CheckpointError: a setting is missing, or none that we have.
    """

    def refuse(name: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{where}: {name} is {settings.get(name)!r}, which cannot be converted: {reason}")

    gated = bool(settings.get("swiglu"))
    norm, wanted = settings.get("normalization", "LayerNorm"), "RMSNorm" if gated else "LayerNorm"
    biases = settings.get("add_bias_linear", not gated)
    if norm != wanted or biases == gated:
        raise refuse(
            "normalization" if norm != wanted else "add_bias_linear",
            "a model here has SwiGLU, RMSNorm and no biases (llama), or GELU, LayerNorm and biases (neox)",
        )
    if settings.get("position_embedding_type", "rope") != "rope":
        raise refuse("position_embedding_type", "positions are rotary here")
    if settings.get("rotary_percent", 1.0) != 1.0:
        raise refuse("rotary_percent", "rotary positions turn all of a head here")
    if settings.get("rotary_interleaved") or settings.get("apply_layernorm_1p") or settings.get("squared_relu"):
        raise CheckpointError(f"{where}: rotary_interleaved, apply_layernorm_1p and squared_relu cannot be converted")
    try:
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        groups = settings.get("num_query_groups") if settings.get("group_query_attention", True) else None
        size = settings.get("kv_channels")
        shape: dict[str, Any] = {
            "family": "llama" if gated else "neox",
            "layers": settings["num_layers"],
            "hidden_size": hidden,
            "ffn_hidden_size": settings["ffn_hidden_size"],
            "attention_heads": heads,
            "query_groups": None if groups in (None, heads) else groups,
            "kv_channels": None if size is None or size * heads == hidden else size,
            "tie_embeddings": not settings.get("untie_embeddings_and_output_weights", False),
            "qkv_bias": gated and bool(settings.get("add_qkv_bias")),
            "qk_norm": bool(settings.get("qk_layernorm")),
            "rotary_base": int(settings.get("rotary_base", 10_000)),
            "rotary_scaling": float(settings.get("rope_scaling_factor", 8.0))
            if settings.get("use_rope_scaling")
            else None,
            "moe": read_experts(settings, where=where, layers=settings["num_layers"]),
            "norm_epsilon": float(settings.get("norm_epsilon", settings.get("layernorm_epsilon", 1e-5))),
            "init_std": float(settings.get("init_method_std") or 0.02),
        }
        if not gated:  # Megatron-Core's fused GELU is the approximation by tanh
            shape["activation"] = "gelu_tanh" if settings.get("bias_gelu_fusion", True) else "gelu"
        vocabulary = settings.get("vocab_size") or rows
        context = settings.get("max_position_embeddings") or settings.get("seq_length")
        if context is None:
            raise KeyError("max_position_embeddings")
        return Model(ModelConfig(**shape), vocabulary, context, {})
    except KeyError as error:
        raise CheckpointError(
            f"{where}: the settings of Megatron-LM in the checkpoint have no {error.args[0]}: name a config.json of the model "
            "by --config"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def settings_of(
    model: Model, *, tensor_parallel: int, pipeline_parallel: int, expert_parallel: int = 1
) -> dict[str, Any]:
    """The inverse of `read_settings`: what Megatron-LM takes from a checkpoint with --use-checkpoint-args."""
    shape = model.shape
    gated = shape.family == "llama"
    return {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.attention_heads,
        "group_query_attention": shape.kv_heads != shape.attention_heads,
        "num_query_groups": shape.kv_heads,
        "kv_channels": shape.head_size,
        "normalization": "RMSNorm" if gated else "LayerNorm",
        "swiglu": gated,
        "add_bias_linear": not gated,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "bias_gelu_fusion": shape.activation == "gelu_tanh",
        "position_embedding_type": "rope",
        "rotary_base": shape.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": shape.rotary_scaling is not None,
        "rope_scaling_factor": shape.rotary_scaling or 8.0,
        "norm_epsilon": shape.norm_epsilon,
        "init_method_std": shape.init_std,
        "untie_embeddings_and_output_weights": not shape.tie_embeddings,
        "vocab_size": model.vocabulary_size,
        "padded_vocab_size": padded_rows(model.vocabulary_size, tensor_parallel=tensor_parallel),
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "max_position_embeddings": model.context_length,
        "seq_length": model.context_length,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "virtual_pipeline_model_parallel_size": None,
        "expert_model_parallel_size": expert_parallel,
        **experts_settings(shape),
    }
