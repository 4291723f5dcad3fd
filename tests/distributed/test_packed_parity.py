"""Sorted and packed windows in a layout against padded ones on one process; and faults of packing, which must be found."""

from typing import Any

import pytest

from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.parallel import LAYOUTS
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.parity.case import ParityCase, parity_case
from tests.parity import compare

NEOX = ModelConfig(layers=5, hidden_size=64, ffn_hidden_size=256, attention_heads=8)
LLAMA = NEOX.model_copy(update={"family": "llama", "query_groups": 4, "tie_embeddings": False})
QWEN = LLAMA.model_copy(update={"qkv_bias": True, "qk_norm": True, "kv_channels": 32, "rotary_scaling": 8.0})
PROJECTED = NEOX.model_copy(update={"projection": Projection(experts=16, capacity=8, code_size=16)})
LORA = LLAMA.model_copy(update={"lora": LowRank(rank=8, alpha=16)})
BY_CLUSTER = NEOX.model_copy(update={"moe": MixtureOfExperts(experts=4, route="cluster")})
ROUTED = LLAMA.model_copy(update={"moe": MixtureOfExperts(experts=4, bias_update_rate=0.01)})
NAMES = {
    id(model): name
    for name, model in {
        "neox": NEOX, "llama": LLAMA, "qwen": QWEN, "projected": PROJECTED, "lora": LORA, "by-cluster": BY_CLUSTER,
        "routed": ROUTED,
    }.items()
}  # fmt: skip
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
PP2 = {"pipeline_parallel": 2}
DP2 = {"data_parallel": 2, "distributed_optimizer": True}
EP2 = {"data_parallel": 2, "expert_parallel": 2}
ZERO = {"engine": "deepspeed", "data_parallel": 2}


def _case(model: ModelConfig, packing: Packing, layout: dict[str, Any], precision: str = "fp32") -> ParityCase:
    parallel = LAYOUTS[layout.get("engine", "megatron")].model_validate({"engine": "megatron", **layout})
    return parity_case(Setup(model, parallel, precision, 1000, 1024, 64, 8, packing=packing))


def _name(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}={setting}" for key, setting in value.items()) or "alone"
    return NAMES.get(id(value), str(value))


@pytest.mark.parametrize(
    ("model", "packing", "layout", "precision"),
    [
        (NEOX, "sorted", {}, "fp32"),
        (NEOX, "packed", {}, "fp32"),
        (QWEN, "packed", {}, "fp32"),
        (LLAMA, "sorted", {**TP2, "recompute": "selective"}, "fp32"),
        (LLAMA, "packed", TP2, "fp32"),
        (LLAMA, "packed", TP2, "bf16"),
        (NEOX, "packed", {"tensor_parallel": 2}, "fp32"),
        (NEOX, "packed", PP2, "fp32"),
        (NEOX, "packed", {**PP2, "virtual_pipeline": 2}, "fp32"),
        (NEOX, "sorted", DP2, "fp32"),
        (NEOX, "packed", {**DP2, "overlap_communication": True}, "fp32"),
        (PROJECTED, "sorted", DP2, "fp32"),
        (PROJECTED, "packed", DP2, "fp32"),
        (PROJECTED, "packed", {**PP2, "recompute": "selective"}, "fp32"),
        (LORA, "packed", {**TP2, "recompute": "full"}, "fp32"),
        (LLAMA, "packed", {**PP2, "data_parallel": 2}, "fp32"),
        (PROJECTED, "packed", {**TP2, **DP2}, "fp32"),
        (BY_CLUSTER, "sorted", {}, "fp32"),
        (BY_CLUSTER, "packed", EP2, "fp32"),
        (ROUTED, "packed", EP2, "fp32"),
        (ROUTED, "packed", {**TP2, **PP2}, "fp32"),
        (NEOX, "sorted", {**ZERO, "zero_stage": 2}, "fp32"),
        (NEOX, "packed", {**ZERO, "zero_stage": 3}, "fp32"),
        (PROJECTED, "packed", {**ZERO, "zero_stage": 2}, "fp32"),
        (BY_CLUSTER, "packed", {**ZERO, "zero_stage": 1, "expert_parallel": 2}, "fp32"),
    ],
    ids=_name,
)
def test_it_equals_padded_windows_on_one_process(
    model: ModelConfig, packing: Packing, layout: dict[str, Any], precision: str
) -> None:
    differences = compare(_case(model, packing, layout, precision))
    assert not [difference for difference in differences if not difference.passed]


@pytest.mark.parametrize("fault", ["attention_leaks_into_the_next_window", "windows_end_a_token_late"])
def test_a_planted_fault_is_found(fault: str) -> None:
    found = {
        entry.quantity: entry for entry in compare(_case(NEOX, "packed", {}), measure=f"tests.parity_faults:{fault}")
    }
    assert {"loss", "validation_loss"} <= {entry.quantity for entry in found.values() if not entry.passed}
    assert not found["gradients"].passed
