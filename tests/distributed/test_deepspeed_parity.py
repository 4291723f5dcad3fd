"""The DeepSpeed engine computes what one process of the Megatron engine computes, in every stage of ZeRO; and faults in it are
found, with the weights that they reach."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest

from megatron_specialm.base.environment import World
from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import DeepSpeedConfig
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.parity.case import ParityCase, parity_case
from megatron_specialm.parity.compare import Difference, certificate, differences_of, read_outcome
from megatron_specialm.parity.rank import measure
from tests.jobs_in_ranks import Job, run_jobs

NEOX = ModelConfig(layers=5, hidden_size=64, ffn_hidden_size=256, attention_heads=8)
LLAMA = NEOX.model_copy(update={"family": "llama", "query_groups": 4, "tie_embeddings": False})
PROJECTED = NEOX.model_copy(update={"projection": Projection(experts=16, capacity=8, code_size=16)})
GATED = NEOX.model_copy(update={"moe": MixtureOfExperts(experts=4, route="cluster")})
LORA = LLAMA.model_copy(update={"lora": LowRank(rank=8, alpha=16)})
DP2, TP2, BOTH = {"data_parallel": 2}, {"tensor_parallel": 2}, {"data_parallel": 2, "tensor_parallel": 2}
OFFLOAD = {"offload_optimizer": True}


class Case(NamedTuple):
    """A model in a layout; accumulation over two micro-batches and clipping are part of each."""

    model: ModelConfig
    stage: int
    layout: dict[str, Any]
    precision: str = "fp32"

    @property
    def parity(self) -> ParityCase:
        parallel = DeepSpeedConfig(engine="deepspeed", zero_stage=self.stage, **self.layout)
        return parity_case(Setup(self.model, parallel, self.precision, 1000, 1024, 64, 8))

    def __str__(self) -> str:
        model = self.model
        method = "-projected" * bool(model.projection) + "-lora" * bool(model.lora) + "-gated" * bool(model.moe)
        return f"{model.family}{method}-{self.parity.parallel.describe()}-{self.precision}".replace(" ", "-")


CASES = [
    *(Case(NEOX, stage, DP2) for stage in (0, 1, 2, 3)),
    *(Case(NEOX, stage, DP2, "bf16") for stage in (1, 2, 3)),
    *(Case(NEOX, stage, {**DP2, **OFFLOAD}) for stage in (1, 2, 3)),
    Case(NEOX, 2, {**DP2, **OFFLOAD}, "bf16"),
    *(Case(LLAMA, stage, TP2) for stage in (0, 1)),
    Case(PROJECTED, 0, DP2),
    Case(PROJECTED, 2, DP2),
    Case(GATED, 1, {**DP2, "expert_parallel": 2}),
    Case(LORA, 1, DP2),
    Case(NEOX, 2, {**DP2, "recompute": "full"}),
    Case(NEOX, 3, {**DP2, "recompute": "selective"}),
    *(Case(LLAMA, stage, BOTH) for stage in (0, 1, 2, 3)),
    Case(LLAMA, 2, BOTH, "bf16"),
    Case(PROJECTED, 1, BOTH),
]


def healthy(world: World, folder: Path, case: ParityCase) -> None:
    measure(case, world, folder)


def divided_by_micro_batches(world: World, folder: Path, case: ParityCase) -> None:
    """DeepSpeed divides each micro-batch's loss by their number, though it is divided by all tokens already."""
    from megatron_specialm.engine.deepspeed.engine import DeepSpeedEngine

    with mock.patch.object(DeepSpeedEngine, "_backward", lambda self, loss: self._zero.backward(loss)):
        measure(case, world, folder)


def copies_drift(world: World, folder: Path, case: ParityCase) -> None:
    """Each copy trains on its own, without any sum over them."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    with mock.patch.object(DeepSpeedZeroOptimizer, "average_tensor", lambda *_: None):
        measure(case, world, folder)


def replicated_counted_twice(world: World, folder: Path, case: ParityCase) -> None:
    """Every tensor-parallel process counts the weights that all of them hold."""
    from megatron_specialm.engine.deepspeed import engine

    group = engine.parallel_state.get_tensor_model_parallel_group
    fake = SimpleNamespace(get_tensor_model_parallel_rank=lambda: 0, get_tensor_model_parallel_group=group)
    with mock.patch.object(engine, "parallel_state", fake):
        measure(case, world, folder)


ALL = ""
FAULTS = [
    (divided_by_micro_batches, Case(NEOX, 1, DP2), "gradients", ALL),
    (copies_drift, Case(NEOX, 2, DP2), "gradients", ALL),
    (replicated_counted_twice, Case(LLAMA, 1, TP2), "norm_counts", "layernorm"),
]


class Runs:
    """All runs, one folder each. Those of a number of processes are made in one set of processes, when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        jobs = [(str(case), healthy, case.parity) for case in CASES]
        jobs += [(fault.__name__, fault, case.parity) for fault, case, *_ in FAULTS]
        references = {_name(case.on_one_process()): case.on_one_process() for _, _, case in jobs}
        self._jobs = [*jobs, *((name, healthy, case) for name, case in references.items())]
        self._made: set[int] = set()

    def differences(self, name: str, case: ParityCase) -> list[Difference]:
        """Of a case's run of that name from one process."""
        for size in {1, case.parallel.world_size} - self._made:
            own = [(job, run, of) for job, run, of in self._jobs if of.parallel.world_size == size]
            run_jobs(self._folder, size, [Job(job, run, (of,)) for job, run, of in own])
            self._made.add(size)
        one = read_outcome(self._folder / _name(case.on_one_process()))
        return differences_of(case, one, read_outcome(self._folder / name))


def _name(reference: ParityCase) -> str:
    """One for equal cases."""
    return f"one-{hashlib.sha256(reference.model_dump_json().encode()).hexdigest()[:12]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case.parity.parallel.world_size == 4)) for case in CASES],
    ids=str,
)
def test_a_layout_equals_one_process_of_the_megatron_engine(runs: Runs, case: Case) -> None:
    assert not [difference for difference in runs.differences(str(case), case.parity) if not difference.passed]


@pytest.mark.parametrize(
    ("fault", "case", "quantity", "wrong"), FAULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_planted_fault_is_found_and_its_places_named(
    runs: Runs, fault: Callable, case: Case, quantity: str, wrong: str
) -> None:
    found = {entry.quantity: entry for entry in runs.differences(fault.__name__, case.parity)}[quantity]
    expected = {name for name in found.by_place if re.search(wrong, name)}
    assert expected and set(found.failed) == expected


def test_a_certificate_names_both_layouts(runs: Runs) -> None:
    case = CASES[1].parity
    found = certificate(case, runs.differences(str(CASES[1]), case), reference=case.by_engine("megatron"))
    assert (found["layout"]["engine"], found["layout"]["zero_stage"]) == ("deepspeed", 1)
    assert (found["reference"]["engine"], found["reference"]["data_parallel"]) == ("megatron", 2)
    assert found["versions"]["deepspeed"] and found["passed"]
