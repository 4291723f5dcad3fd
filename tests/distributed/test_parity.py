"""Every layout that four processes can hold, against one process; and faults, which must be found."""

import math
import re
from itertools import product

import pytest

from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.parity.case import parity_case
from megatron_specialm.parity.compare import WORST, Difference, certificate, table
from tests.parity import compare

NEOX = ModelConfig(layers=5, hidden_size=64, ffn_hidden_size=256, attention_heads=8)
LLAMA = NEOX.model_copy(update={"family": "llama", "query_groups": 4, "tie_embeddings": False})
QWEN = LLAMA.model_copy(update={"qkv_bias": True, "qk_norm": True, "kv_channels": 32, "rotary_scaling": 8.0})
PROJECTION = {"projection": Projection(experts=16, capacity=8, code_size=16)}
LORA = {"lora": LowRank(rank=8, alpha=16)}


def _layouts() -> list[dict]:
    """All of TP x PP x DP with up to four processes, with sequence parallelism and distributed optimizer where they
    mean anything."""
    found = []
    for tensor, pipeline, data in product((1, 2, 4), (1, 2, 4), (1, 2)):
        if 1 < tensor * pipeline * data <= 4:
            for sequence, shared in product(
                (False, True) if tensor > 1 else (False,), (False, True) if data > 1 else (False,)
            ):
                found.append(
                    {
                        "tensor_parallel": tensor, "pipeline_parallel": pipeline, "data_parallel": data,
                        "sequence_parallel": sequence, "distributed_optimizer": shared,
                    }
                )  # fmt: skip
    return found


LAYOUTS = _layouts()
SPECIAL = [
    {"pipeline_parallel": 2, "virtual_pipeline": 2},
    {"pipeline_parallel": 2, "virtual_pipeline": 2, "data_parallel": 2, "distributed_optimizer": True},
    {"pipeline_parallel": 2, "tensor_parallel": 2, "virtual_pipeline": 2, "sequence_parallel": True},
    {"data_parallel": 2, "overlap_communication": True},
    {"data_parallel": 2, "overlap_communication": True, "distributed_optimizer": True},
    {"pipeline_parallel": 2, "data_parallel": 2, "overlap_communication": True, "distributed_optimizer": True},
    {"tensor_parallel": 2, "recompute": "selective"},
    {"tensor_parallel": 2, "sequence_parallel": True, "recompute": "full"},
    {"pipeline_parallel": 2, "recompute": "full"},
]

# Where derived weights can go wrong: cut factors, positions and layers of one's own, late gradients, early values.
DERIVED = [
    {"tensor_parallel": 2},
    {"tensor_parallel": 4},
    {"tensor_parallel": 2, "sequence_parallel": True, "recompute": "full"},
    {"pipeline_parallel": 2, "recompute": "selective"},
    {"pipeline_parallel": 2, "tensor_parallel": 2},
    {"data_parallel": 2},
    {"data_parallel": 2, "overlap_communication": True},
    {"data_parallel": 2, "distributed_optimizer": True},
    *SPECIAL[:3],
    *SPECIAL[4:6],
]


def _compare(layout: dict, model: ModelConfig, precision: str = "fp32", **measure: str) -> list[Difference]:
    return compare(parity_case(Setup(model, ParallelConfig(**layout), precision, 1000, 1024, 64, 8)), **measure)


def _name(layout: dict) -> str:
    return ParallelConfig(**layout).describe().replace(" ", "-")


def _label(value: ModelConfig | dict | str) -> str:
    if isinstance(value, ModelConfig):
        return value.family
    if isinstance(value, dict):
        return next(iter(value)) if value in (PROJECTION, LORA) else _name(value)
    return value


def _slow_on_four(*cells: tuple) -> list:
    """Cells that end with a layout: `--quick` leaves out those of four processes."""
    return [
        pytest.param(*cell, marks=[pytest.mark.slow] * (ParallelConfig(**cell[-1]).world_size == 4)) for cell in cells
    ]


@pytest.mark.parametrize(
    ("precision", "layout"),
    [*product(["fp32"], LAYOUTS + SPECIAL), *_slow_on_four(*product(["bf16"], LAYOUTS + SPECIAL))],
    ids=_label,
)
def test_a_layout_equals_one_process(precision: str, layout: dict) -> None:
    failed = [difference for difference in _compare(layout, NEOX, precision) if not difference.passed]
    assert not failed


@pytest.mark.parametrize(
    ("layout",),
    [
        *_slow_on_four(*((entry,) for entry in LAYOUTS + SPECIAL[:2] if entry.get("tensor_parallel", 1) <= 2)),
        SPECIAL[2:3],
    ],
    ids=_name,
)
def test_so_it_does_with_gates_grouped_queries_and_untied_embeddings(layout: dict) -> None:
    failed = [difference for difference in _compare(layout, LLAMA) if not difference.passed]
    assert not failed


@pytest.mark.parametrize(
    "layout", [{"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}, SPECIAL[1]], ids=_name
)
def test_so_it_does_with_norms_of_heads_and_biases_of_attention(layout: dict) -> None:
    failed = [difference for difference in _compare(layout, QWEN) if not difference.passed]
    assert not failed


@pytest.mark.parametrize(
    ("family", "method", "precision", "layout"),
    [
        *product([NEOX], [PROJECTION], ["fp32"], DERIVED),
        *_slow_on_four(
            *product([LLAMA], [LORA], ["fp32"], DERIVED),
            *product([LLAMA], [PROJECTION], ["fp32", "bf16"], SPECIAL[2:3] + SPECIAL[5:6]),
            *product([NEOX], [LORA], ["fp32", "bf16"], SPECIAL[2:3] + SPECIAL[5:6]),
        ),
    ],
    ids=_label,
)
def test_so_it_does_with_derived_weights(family: ModelConfig, method: dict, precision: str, layout: dict) -> None:
    differences = _compare(layout, family.model_copy(update=method), precision)
    assert not [difference for difference in differences if not difference.passed]


# Weights that all tensor-parallel processes hold, and see the gradients of their own positions of.
BY_POSITION = r"layernorm|linear_proj\.bias|linear_fc2\.bias"
ALL = ""


@pytest.mark.parametrize(
    ("model", "precision", "layout"),
    [
        (LLAMA, "fp32", {"tensor_parallel": 2, "sequence_parallel": True}),
        (NEOX, "fp32", {"data_parallel": 2, "distributed_optimizer": True}),
        # Codes and projections are fp32 beside bf16 bases: of both, from two chunks, the optimizer has shards in one list.
        (NEOX.model_copy(update=PROJECTION), "bf16", SPECIAL[1]),
    ],
    ids=_label,
)
def test_updates_are_those_of_adamw_with_weight_decay(model: ModelConfig, precision: str, layout: dict) -> None:
    differences = _compare(layout, model, precision, measure="tests.adamw:measure_beside_adamw")
    assert not [difference for difference in differences if not difference.passed]


@pytest.mark.parametrize(
    ("fault", "layout", "quantity", "wrong"),
    [
        ("no_forward_reduction", {"tensor_parallel": 2}, "gradients", ALL),
        ("no_backward_reduction", {"tensor_parallel": 2}, "gradients", ALL),
        ("no_norm_reduction", {"tensor_parallel": 2, "sequence_parallel": True}, "gradients", BY_POSITION),
        ("no_embedding_reduction", {"pipeline_parallel": 2}, "gradients", "word_embeddings"),
        ("replicated_counted_twice", {"tensor_parallel": 2}, "norm_counts", f"{BY_POSITION}|projection|expert_codes"),
        ("scaled_by_copies", {"data_parallel": 2}, "gradients", ALL),
        ("batched_interleaving", {"pipeline_parallel": 2, "virtual_pipeline": 2}, "gradients", ALL),
        ("copies_drift", {"data_parallel": 2}, "gradients", ALL),
        ("stages_keep_their_codes", {"pipeline_parallel": 2}, "gradients", "expert_codes"),
        ("derived_before_gathered", SPECIAL[4], "weights", ALL),
        ("partial_coefficients", {"tensor_parallel": 2}, "gradients", "projection|expert_codes"),
    ],
)
def test_a_planted_fault_is_found_and_its_places_named(fault: str, layout: dict, quantity: str, wrong: str) -> None:
    """Which weights a fault reaches is determined; which of them differs most hangs on a processor's rounding."""
    model = NEOX.model_copy(update=PROJECTION)
    found = {entry.quantity: entry for entry in _compare(layout, model, measure=f"tests.parity_faults:{fault}")}
    weights = found[quantity].by_place
    expected = {name for name in weights if re.search(wrong, name)}
    assert expected and set(found[quantity].failed) == expected

    case = parity_case(Setup(model, ParallelConfig(**layout), "fp32", 1000, 1024, 64, 8))
    outcome = certificate(case, found.values())
    assert not outcome["passed"]
    entry = next(entry for entry in outcome["differences"] if entry["quantity"] == quantity)
    assert (entry["failed"], entry["compared"], entry["passed"]) == (len(expected), len(weights), False)
    named = [place["where"] for place in entry["worst"][: len(expected)]]
    assert len(named) == min(len(expected), WORST) and set(named) <= expected
    cells = table("slm", outcome).columns[-1].cells
    assert any(named == [line.split()[-1] for line in cell.plain.splitlines()] for cell in cells)


def test_equal_differences_stand_in_the_order_of_names() -> None:
    last_bit = 2**-52
    for noise in (-last_bit, 0.0, last_bit):
        tied = Difference("gradients", 1e-5, {"b": 1.0, "c": 2.0, "a": 1.0 + noise, "d": 1e-7})
        assert tied.places == ["c", "a", "b", "d"]
        assert tied.failed == ["c", "a", "b"] and not tied.passed
    assert str(tied) == "gradients: 3 of 4 over 1e-05: c 2.0e+00, a 1.0e+00, b 1.0e+00"


def test_what_is_no_number_is_the_worst_difference() -> None:
    broken = Difference("weights", 1e-4, {"a": 1.0, "b": math.nan, "c": 0.0})
    assert broken.places == ["b", "a", "c"] and broken.failed == ["b", "a"]
    assert broken.largest == math.inf and not broken.passed
