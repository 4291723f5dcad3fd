"""Distillation in real processes against one: the teacher online and cached, the vocabulary (131) divided by no layout."""

from pathlib import Path

import pytest

from megatron_specialm.base.environment import ALONE
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.engine.process_groups import process_group
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.parity import compare as parity
from megatron_specialm.parity.case import ParityCase, parity_case
from tests.distillation import prepare
from tests.processes import rank_context

STUDENT = ModelConfig(layers=2, hidden_size=64, ffn_hidden_size=256, attention_heads=8)
KINDS = ["online", "exact", "top_k", "sampled"]
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
TP4 = {"tensor_parallel": 4}  # of 131 columns: 64, 64, 3, none
DP2 = {"data_parallel": 2, "distributed_optimizer": True}
TP2_DP2 = {"tensor_parallel": 2, "data_parallel": 2, "recompute": "full"}
PP2 = {"pipeline_parallel": 2}
EP2 = {"data_parallel": 2, "expert_parallel": 2, "distributed_optimizer": True}
TP2_EP2 = {**TP2, "data_parallel": 2, "expert_parallel": 2}


def _case(layout: dict, precision: str = "fp32", packing: Packing = "none") -> ParityCase:
    """Eight windows a step in every layout, two at a time."""
    case = parity_case(Setup(STUDENT, ParallelConfig(**layout), precision, 1000, 1024, 64, 8, packing=packing))
    return case.model_copy(
        update={
            "model": STUDENT,
            "context_length": 16,
            "micro_batches": 4 // case.parallel.data_parallel,
        }
    )


class Runs:
    """What each kind of teacher gives, by layout; one process is asked once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = rank_context()
        self._found: dict[str, parity.Outcome] = {}
        with process_group(ALONE):
            prepare(_case({}), folder)

    def run(self, kind: str, layout: dict, precision: str = "fp32", packing: Packing = "none") -> parity.Outcome:
        name = f"{kind}-{layout}-{precision}-{packing}"
        if name not in self._found:
            case, folder = _case(layout, precision, packing), self._folder / str(len(self._found))
            folder.mkdir()
            parity._run(self._context, case, folder, f"tests.distillation:{kind}")
            self._found[name] = parity.read_outcome(folder)
        return self._found[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("distillation"))


def _failed(
    one: parity.Outcome, other: parity.Outcome, layout: dict, precision: str = "fp32"
) -> list[parity.Difference]:
    return [entry for entry in parity.differences_of(_case(layout, precision), one, other) if not entry.passed]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for kind in KINDS for layout in (TP2, TP4, DP2, TP2_DP2)] + [(kind, PP2) for kind in KINDS[1:]],
    ids=lambda value: value if isinstance(value, str) else ParallelConfig(**value).describe().replace(" ", "-"),
)
def test_a_layout_equals_one_process(runs: Runs, kind: str, layout: dict) -> None:
    assert not _failed(runs.run(kind, {}), runs.run(kind, layout), layout)


@pytest.mark.parametrize(
    ("kind", "layout", "packing"),
    [("online", TP2, "packed"), ("exact", TP2, "sorted"), ("top_k", DP2, "packed"), ("sampled", PP2, "packed")],
    ids=lambda value: value if isinstance(value, str) else ParallelConfig(**value).describe().replace(" ", "-"),
)
def test_packed_windows_in_a_layout_equal_padded_ones_on_one_process(
    runs: Runs, kind: str, layout: dict, packing: Packing
) -> None:
    assert not _failed(runs.run(kind, {}), runs.run(kind, layout, packing=packing), layout)


@pytest.mark.parametrize("layout", [EP2, TP2_EP2], ids=["EP2", "TP2-EP2"])
def test_a_teacher_of_experts_is_split_by_expert_parallelism_beside_a_dense_student(runs: Runs, layout: dict) -> None:
    assert not _failed(runs.run("online_of_experts", {}), runs.run("online_of_experts", layout), layout)


def test_so_it_does_in_bf16(runs: Runs) -> None:
    one, two = (runs.run("online", layout, "bf16") for layout in ({}, TP2))
    assert not _failed(one, two, TP2, "bf16")


def test_a_softmax_over_own_columns_is_found(runs: Runs) -> None:
    found = _failed(runs.run("online", {}), runs.run("online_with_own_columns_only", TP2), TP2)
    assert {"loss", "gradients"} <= {entry.quantity for entry in found}


def test_the_exact_cache_equals_the_teacher_online(runs: Runs) -> None:
    for layout in ({}, TP4):
        assert not _failed(runs.run("online", {}), runs.run("exact", layout), layout)


def test_the_kinds_are_not_taken_for_one_another(runs: Runs) -> None:
    """The comparisons above would see it."""
    exact = runs.run("exact", {})
    for kind in ("top_k", "sampled"):
        found = {entry.quantity for entry in _failed(exact, runs.run(kind, {}), {})}
        assert {"loss", "gradients"} <= found


def test_a_teacher_beside_a_pipeline_is_refused(runs: Runs) -> None:
    with pytest.raises(parity.TrainingError, match="a teacher beside its student runs on one stage"):
        runs.run("online", PP2)
