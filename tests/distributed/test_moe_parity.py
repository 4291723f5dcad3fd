"""MoE models in layouts of up to four processes, against one process; and faults, which must be found."""

import re

import pytest

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.parity.case import ParityCase, parity_case
from tests.parity import compare

LLAMA = ModelConfig(family="llama", layers=4, hidden_size=64, ffn_hidden_size=256, attention_heads=8)
NEOX = LLAMA.model_copy(update={"family": "neox"})
EP2 = {"data_parallel": 2, "expert_parallel": 2}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
ZERO = {"distributed_optimizer": True}


def _case(model: ModelConfig, moe: dict, layout: dict, precision: str = "fp32") -> ParityCase:
    model = model.model_copy(update={"moe": MixtureOfExperts(**{"experts": 8, "z_loss": 0.01, **moe})})
    return parity_case(Setup(model, ParallelConfig(**layout), precision, 1000, 1024, 64, 8))


def _name(value: object) -> str:
    if isinstance(value, ModelConfig):
        return value.family
    if not isinstance(value, dict):
        return str(value)
    if set(value) <= set(MixtureOfExperts.model_fields):
        return "-".join(f"{key}={setting}" for key, setting in value.items()) or "top_k=2"
    return ParallelConfig(**value).describe().replace(" ", "-")


@pytest.mark.parametrize(
    ("model", "moe", "layout", "precision"),
    [
        (LLAMA, {"shared_expert": 128}, {"data_parallel": 2}, "fp32"),
        (LLAMA, {}, EP2, "fp32"),
        (LLAMA, {"shared_expert": 128}, EP2, "bf16"),
        (LLAMA, {"top_k": 1}, {"data_parallel": 4, "expert_parallel": 4, **ZERO}, "fp32"),
        (LLAMA, {"shared_expert": 128}, {"data_parallel": 4, "expert_parallel": 2, **ZERO}, "fp32"),
        (LLAMA, {}, {**EP2, **ZERO, "overlap_communication": True}, "fp32"),
        (LLAMA, {"residual": True}, TP2, "fp32"),
        (NEOX, {"residual": True, "top_k": 1}, TP2, "fp32"),
        (NEOX, {"shared_expert": 128}, {**TP2, "expert_parallel": 2}, "fp32"),
        (LLAMA, {"shared_expert": 128}, {**TP2, **EP2}, "fp32"),
        (NEOX, {"residual": True}, {**TP2, **EP2, **ZERO}, "fp32"),
        (LLAMA, {"every": 2}, {"pipeline_parallel": 2}, "fp32"),
        (LLAMA, {"experts": [4, 4, 8, 8]}, {"pipeline_parallel": 2, **EP2}, "fp32"),
        (LLAMA, {}, {"pipeline_parallel": 2, "virtual_pipeline": 2, **EP2}, "fp32"),
        (LLAMA, {"top_k": 3, "capacity_factor": 0.7, "min_capacity": 1}, EP2, "fp32"),
        (LLAMA, {"capacity_factor": 0.7, "min_capacity": 1}, TP2, "fp32"),
        (LLAMA, {"bias_update_rate": 0.01, "aux_loss": 0.0, "z_loss": 0.0}, EP2, "fp32"),
        (LLAMA, {}, {**TP2, "recompute": "full"}, "fp32"),
        (NEOX, {"shared_expert": 128}, {**TP2, "recompute": "selective"}, "fp32"),
    ],
    ids=_name,
)
def test_an_moe_in_a_layout_equals_one_process(model: ModelConfig, moe: dict, layout: dict, precision: str) -> None:
    differences = compare(_case(model, moe, layout, precision))
    assert "gates" in {difference.quantity for difference in differences}
    assert not [difference for difference in differences if not difference.passed]


@pytest.mark.parametrize(
    ("model", "layout"),
    [(LLAMA, EP2), (NEOX, {**TP2, **EP2, "recompute": "full"}), (LLAMA, {"pipeline_parallel": 2, **EP2, **ZERO})],
    ids=_name,
)
def test_an_moe_that_routes_by_cluster_equals_one_process(model: ModelConfig, layout: dict) -> None:
    differences = compare(_case(model, {"route": "cluster", "z_loss": 0.0}, layout))
    assert not [difference for difference in differences if not difference.passed]


EXPERTS = r"mlp\.experts\."
BEFORE_THE_LAST_ROUTER = r"^(?!decoder\.layers\.1\.mlp\.experts|decoder\.final_layernorm)"


@pytest.mark.parametrize(
    ("fault", "layout", "quantity", "wrong", "further"),
    [
        ("experts_scaled_by_copies", EP2, "gradients", EXPERTS, False),
        ("experts_not_in_the_norm", EP2, "norm_counts", EXPERTS, False),
        ("aux_loss_of_each_tensor_rank", TP2, "gradients", BEFORE_THE_LAST_ROUTER, False),
        ("aux_loss_of_each_tensor_rank", TP2, "gates", "layer", False),
        ("no_expert_bias", EP2, "gradients", r"mlp\.experts\.linear_fc2\.bias", True),
        ("equal_experts", EP2, "weights", EXPERTS + "linear_fc1.weight", True),
        ("same_experts_on_all", EP2, "weights", EXPERTS + "linear_fc1.weight", True),
    ],
)
def test_a_planted_fault_is_found_and_its_places_named(
    fault: str, layout: dict, quantity: str, wrong: str, further: bool
) -> None:
    """The fault reaches these weights alone, or, through loss and hidden states, others less (`further`)."""
    found = {
        entry.quantity: entry for entry in compare(_case(NEOX, {}, layout), measure=f"tests.parity_faults:{fault}")
    }
    expected = {name for name in found[quantity].by_place if re.search(wrong, name)}
    failed = found[quantity].failed
    assert expected and expected <= set(failed)
    assert re.search(wrong, failed[0]) if further else set(failed) == expected
