"""Mixtures of experts in Megatron's checkpoints: the names of their weights, and Megatron-LM's settings.

decoder.layers.0.mlp.experts.experts.linear_fc1.weight (E, ...)     torch_dist: all experts of a layer
decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight            torch_dist with `singleton_local_shards`
decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight      modules with one expert after the other
decoder.layers.0.mlp.experts.linear_fc1.weight3                     modules with a grouped GEMM
decoder.layers.0.mlp.shared_experts.linear_fc1.weight, .gate_weight
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert.lazy import LazyTensor, part, stacked
from megatron_specialm.convert.source import Layout
from megatron_specialm.model.weights import EXPERTS, SHARED_EXPERT, SHARED_EXPERT_GATE, WeightSpec

_EXPERT = re.compile(
    r"(?P<layer>decoder\.layers\.\d+\.)mlp\.experts\.(?:experts\.|local_experts\.)?(?:(?P<number>\d+)\.)?"
    r"(?P<weight>linear_fc[12]\.(?:weight|bias))(?P<grouped>\d*)"
)
_SHARED, _GATE = "mlp.shared_experts", "mlp.shared_experts.gate_weight"
Settings = dict[str, Any]


def canonical_place(name: str) -> tuple[str, int | None]:
    """The canonical name of a weight, and the number of the expert that it is of; None for a weight of all of a layer's
    experts, or of none."""
    if match := _EXPERT.fullmatch(name):
        number = match["number"] or match["grouped"]
        return f"{match['layer']}{EXPERTS}.{match['weight']}", int(number) if number else None
    return name.replace(_GATE, SHARED_EXPERT_GATE).replace(_SHARED, SHARED_EXPERT), None


def megatron_expert_name(name: str) -> str:
    """The name in torch_dist of a canonical weight of an MoE layer; other names as they are."""
    for ours, theirs in ((SHARED_EXPERT_GATE, _GATE), (f"{SHARED_EXPERT}.", f"{_SHARED}.")):
        name = name.replace(ours, theirs)
    return name.replace(f"{EXPERTS}.", f"{EXPERTS}.experts.")


def expert_parts(name: str, tensor: LazyTensor) -> Iterator[tuple[str, LazyTensor]]:
    """Each expert's part of a canonical weight of all experts, by its name in a module."""
    for expert in range(tensor.shape[0]):
        yield name.replace(f"{EXPERTS}.", f"{EXPERTS}.local_experts.{expert}."), part(tensor, expert)


def spec_of(name: str, specs: Mapping[str, WeightSpec]) -> WeightSpec | None:
    """The spec of a weight by its name in Megatron; of one expert's weight, without the dimension over experts."""
    canonical, expert = canonical_place(name)
    spec = specs.get(canonical)
    if spec is None or expert is None:
        return spec
    return replace(spec, shape=spec.shape[1:], cut=None if spec.cut is None else spec.cut - 1, is_expert=False)


def joined_experts(stored: Mapping[str, LazyTensor], shape: ModelConfig, where: Path) -> dict[str, LazyTensor]:
    """Tensors under canonical names; those of single experts are joined.

    Raises:
        CheckpointError: an expert is missing or twice.
    """
    found: dict[str, LazyTensor] = {}
    experts: dict[str, dict[int, LazyTensor]] = {}
    for theirs, tensor in stored.items():
        name, expert = canonical_place(theirs)
        place: dict[Any, LazyTensor] = found if expert is None else experts.setdefault(name, {})
        key = name if expert is None else expert
        if key in place:
            raise CheckpointError(f"{where}: {theirs} is there twice, under names of two kinds")
        place[key] = tensor
    for name, own in experts.items():
        count = shape.experts_of(int(name.split(".")[2]))
        if name in found:
            raise CheckpointError(f"{where}: {name} is there twice: of all experts and of each")
        if odd := sorted(own.keys() ^ set(range(count))):
            problem = "is missing" if odd[0] not in own else "is not one of the model's"
            raise CheckpointError(f"{where}: {name}: expert {odd[0]} {problem}; the model has {count} there")
        found[name] = stacked([own[expert] for expert in range(count)])
    return found


def check_experts(shape: ModelConfig, layout: Layout) -> None:
    """Refuse a layout that does not divide the experts.

    Raises:
        CheckpointError: naming the numbers.
    """
    size, counts = layout.expert_parallel, shape.moe.counts if shape.moe is not None else []
    if size != 1 and not counts:
        raise CheckpointError(f"expert_parallel {size}: the model has no experts: leave out --expert-parallel")
    if odd := [count for count in counts if count % size]:
        raise CheckpointError(
            f"expert_parallel {size} does not divide the model's {odd[0]} experts: choose an --expert-parallel that does"
        )
    if counts and shape.family == "neox" and layout.tensor_parallel > 1:
        raise CheckpointError(
            f"tensor_parallel {layout.tensor_parallel}: experts with biases (family neox) are not split: leave it at 1"
        )


def read_experts(settings: Mapping[str, Any], *, where: Path, layers: int) -> Settings | None:
    """The settings `moe` of a model by Megatron-LM's; None for a dense model.

    Raises:
        CheckpointError: a router or a place of experts that we have not.
    """
    if not settings.get("num_experts"):
        return None

    def refuse(name: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{where}: {name} is {settings.get(name)!r}, which cannot be converted: {reason}")

    top_k = settings.get("moe_router_topk", 2)
    scores = settings.get("moe_router_score_function", "softmax")
    biased = bool(settings.get("moe_router_enable_expert_bias"))
    if scores not in ("softmax", "sigmoid") or biased != (scores == "sigmoid"):
        raise refuse("moe_router_score_function", "a router has softmax scores, or sigmoids and an expert bias")
    if scores == "softmax" and bool(settings.get("moe_router_pre_softmax")) != (top_k == 1):
        raise refuse(
            "moe_router_pre_softmax",
            f"with top-{top_k}: the weights of several experts are divided by their sum, and one has its probability",
        )
    for name in ("moe_router_num_groups", "moe_router_topk_scaling_factor", "moe_latent_size"):
        if settings.get(name):
            raise refuse(name, "routers and experts have no such thing here")
    shared = settings.get("moe_shared_expert_intermediate_size")
    if shared and not settings.get("moe_shared_expert_gate"):
        raise refuse("moe_shared_expert_gate", "a shared expert is scaled by a sigmoid here")
    capacity = settings.get("moe_expert_capacity_factor")
    return {
        "experts": settings["num_experts"],
        "every": _every(settings.get("moe_layer_freq", 1), layers, refuse),
        "top_k": top_k,
        "ffn_hidden_size": settings.get("moe_ffn_hidden_size"),
        "shared_expert": shared or None,
        "capacity_factor": None if capacity is None or capacity < 0 else capacity,
        "aux_loss": _number(settings.get("moe_aux_loss_coeff")),
        "z_loss": _number(settings.get("moe_z_loss_coeff")),
        "bias_update_rate": float(settings.get("moe_router_bias_update_rate") or 1e-3) if biased else 0.0,
    }


def _number(value: Any) -> float:
    """A coefficient, of a list the first."""
    return float((value[0] if isinstance(value, list) else value) or 0.0)


def _every(frequency: int | list[int], layers: int, refuse: Any) -> int:
    """`every` of a pattern of layers with experts."""
    pattern = frequency if isinstance(frequency, list) else [int(n % frequency == 0) for n in range(layers)]
    every = pattern.index(1) + 1 if 1 in pattern else 1
    if pattern != _pattern(every, layers):
        raise refuse("moe_layer_freq", "the last of every so many layers has experts here, as in [0, 1, 0, 1]")
    return every


def _pattern(every: int, layers: int) -> list[int]:
    return [int((layer + 1) % every == 0) for layer in range(layers)]


def experts_settings(shape: ModelConfig) -> Settings:
    """The inverse of `read_experts`.

    Raises:
        CheckpointError: Megatron-Core has no such mixture of experts.
    """
    moe = shape.moe
    if moe is None:
        return {}
    if moe.residual or len(set(moe.counts)) > 1:
        what = "moe.residual" if moe.residual else f"moe.experts {moe.counts}, which differ"
        raise CheckpointError(f"Megatron-Core has no {what}: only the canonical format holds such a model")
    return {
        "num_experts": moe.counts[0],
        "moe_layer_freq": 1 if moe.every == 1 else _pattern(moe.every, shape.layers),
        "moe_ffn_hidden_size": moe.ffn_hidden_size or shape.ffn_hidden_size,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": "sigmoid" if moe.bias_update_rate else "softmax",
        "moe_router_pre_softmax": moe.top_k == 1 and not moe.bias_update_rate,
        "moe_router_enable_expert_bias": bool(moe.bias_update_rate),
        "moe_router_bias_update_rate": moe.bias_update_rate or 1e-3,
        "moe_router_load_balancing_type": "aux_loss" if moe.aux_loss else "none",
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": moe.aux_loss,
        "moe_z_loss_coeff": moe.z_loss or None,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_shared_expert_intermediate_size": moe.shared_expert,
        "moe_shared_expert_gate": moe.shared_expert is not None,
        "moe_grouped_gemm": False,
    }
