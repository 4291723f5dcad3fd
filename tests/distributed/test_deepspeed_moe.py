"""MoE models under the DeepSpeed engine: equal to one process and to like layouts of the Megatron engine; faults, which must be
found; checkpoints that move between engines; a killed run that goes on."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_specialm.base.environment import World
from megatron_specialm.checkpoint.opening import open_checkpoint
from megatron_specialm.checkpoint.steps import step_folder
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import LAYOUTS, DeepSpeedConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.engine.open import open_engine
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.initial import first_weight
from megatron_specialm.model.weights import weight_specs
from megatron_specialm.parity.case import ParityCase, parity_case
from megatron_specialm.parity.compare import Difference, differences_of, read_outcome
from megatron_specialm.parity.rank import measure
from megatron_specialm.train.distillation import Distillation
from tests.jobs_in_ranks import Job, run_jobs
from tests.training import (
    CONTEXT,
    EPSILON,
    SHAPE,
    VOCABULARY,
    MemoryStore,
    read_metrics,
    run_layout,
    run_training,
    stage,
    start_ranks,
)  # fmt: skip

LLAMA = ModelConfig(family="llama", layers=4, hidden_size=64, ffn_hidden_size=256, attention_heads=8)
NEOX = LLAMA.model_copy(update={"family": "neox"})
DP2, DP4, TP2 = {"data_parallel": 2}, {"data_parallel": 4}, {"tensor_parallel": 2}
EP2, EP4 = {"expert_parallel": 2}, {"expert_parallel": 4}
SHARED, RESIDUAL = {"shared_expert": 128}, {"residual": True}
DROPS = {"capacity_factor": 0.7, "min_capacity": 1}
BIASED = {"bias_update_rate": 0.01, "aux_loss": 0.0, "z_loss": 0.0}
BY_CLUSTER = {"route": "cluster"}
OFFLOAD = {"offload_optimizer": True}


class Case(NamedTuple):
    """An MoE model in a layout, and the engine of the reference: None for one process."""

    model: ModelConfig
    moe: dict[str, Any]
    zero_stage: int
    layout: dict[str, Any]
    precision: str = "fp32"
    against: str | None = None

    @property
    def parity(self) -> ParityCase:
        parallel = DeepSpeedConfig(engine="deepspeed", zero_stage=self.zero_stage, **self.layout)
        losses = {} if self.moe == BY_CLUSTER else {"z_loss": 0.01}
        moe = MixtureOfExperts(**{"experts": 8, **losses, **self.moe})
        model = self.model.model_copy(update={"moe": moe})
        return parity_case(Setup(model, parallel, self.precision, 1000, 1024, 64, 8))

    @property
    def reference(self) -> ParityCase:
        return self.parity.on_one_process() if self.against is None else self.parity.by_engine(self.against)

    def __str__(self) -> str:
        moe = "-".join(f"{key}={value}" for key, value in self.moe.items()) or "top_k=2"
        layout = self.parity.parallel.describe().replace(" ", "-")
        return f"{self.model.family}-{moe}-{layout}-{self.precision}" + f"-{self.against}" * bool(self.against)


FEW = [
    Case(LLAMA, SHARED, 1, {**DP2, **EP2}),
    Case(LLAMA, {"top_k": 1}, 2, {**DP2, **EP2}),
    Case(NEOX, RESIDUAL, 2, {**TP2, **EP2}),
    Case(LLAMA, SHARED, 2, {**DP2, **EP2}, "fp32", "megatron"),
]
MANY = [
    *(Case(LLAMA, {}, number, DP2) for number in (0, 1, 2)),
    Case(LLAMA, {"top_k": 3, **DROPS}, 2, {**DP2, **EP2}),
    Case(LLAMA, BIASED, 1, {**DP2, **EP2}),
    Case(LLAMA, {"experts": [4, 4, 8, 8]}, 2, {**DP2, **EP2}),
    Case(LLAMA, {"every": 2}, 1, {**DP2, **EP2, **OFFLOAD}),
    Case(LLAMA, {}, 2, {**DP2, **EP2, **OFFLOAD}),
    Case(LLAMA, {}, 2, {**DP2, **EP2, "recompute": "full"}),
    Case(NEOX, SHARED, 1, {**TP2, "recompute": "selective"}),
    *(Case(NEOX, {}, number, TP2) for number in (0, 1)),
    Case(LLAMA, SHARED, 2, TP2),
    Case(LLAMA, DROPS, 1, TP2),
    Case(LLAMA, {}, 1, {**DP2, **EP2}, "bf16"),
    Case(LLAMA, SHARED, 2, {**DP2, **EP2, **OFFLOAD}, "bf16"),
    Case(NEOX, {"top_k": 1}, 2, {**TP2, **EP2}, "bf16"),
    Case(LLAMA, BIASED, 1, DP2, "bf16"),
    Case(LLAMA, {"top_k": 1}, 2, {**DP4, **EP4}),
    Case(LLAMA, SHARED, 2, {**DP4, **EP2}),
    Case(LLAMA, SHARED, 1, {**DP2, **TP2}),
    *(Case(LLAMA, {}, number, {**DP2, **TP2, **EP2}) for number in (1, 2)),
    Case(NEOX, RESIDUAL, 2, {**DP2, **TP2, **EP2}),
    Case(NEOX, RESIDUAL, 1, {**DP2, **TP2, **EP4}),
    Case(LLAMA, {**SHARED, **DROPS}, 1, TP2, "fp32", "megatron"),
    Case(LLAMA, RESIDUAL, 1, {**DP2, **TP2, **EP2}, "fp32", "megatron"),
    Case(LLAMA, BIASED, 2, {**DP4, **EP4}, "fp32", "megatron"),
    *(Case(LLAMA, BY_CLUSTER, number, {**DP2, **EP2}) for number in (1, 2)),
    Case(NEOX, BY_CLUSTER, 1, {**DP2, **TP2, **EP2}),
    Case(LLAMA, BY_CLUSTER, 2, {**DP2, **EP2}, "bf16"),
]


def healthy(world: World, folder: Path, case: ParityCase) -> None:
    measure(case, world, folder)


def experts_scaled_by_processes(world: World, folder: Path, case: ParityCase) -> None:
    """The gradients of experts are multiplied by the number of processes that the experts are split over."""
    from megatron_specialm.engine.deepspeed.moe import DeepSpeedExperts

    build = DeepSpeedExperts.__init__

    def scaled(module: DeepSpeedExperts, *settings: Any) -> None:
        build(module, *settings)
        for parameter in module.moe.deepspeed_moe.experts.parameters():
            parameter.register_hook(lambda gradient: gradient * case.parallel.expert_parallel)

    with mock.patch.object(DeepSpeedExperts, "__init__", scaled):
        measure(case, world, folder)


def experts_not_in_the_norm(world: World, folder: Path, case: ParityCase) -> None:
    """The norm by which gradients are clipped is that of the dense weights."""
    from megatron_specialm.engine.deepspeed.engine import DeepSpeedEngine

    healthy = DeepSpeedEngine._counted_squares

    def dense(engine: DeepSpeedEngine, gradients: list) -> dict[str, float]:
        return healthy(engine, [pair for pair in gradients if not pair[0].spec.is_expert])

    with mock.patch.object(DeepSpeedEngine, "_counted_squares", dense):
        measure(case, world, folder)


def auxiliary_losses_undivided(world: World, folder: Path, case: ParityCase) -> None:
    """The auxiliary losses' gradients are not divided by tokens, as the loss's are."""
    from megatron_specialm.engine.deepspeed import engine

    with mock.patch.object(engine, "auxiliary_losses_times", contextlib.nullcontext):
        measure(case, world, folder)


def no_expert_bias(world: World, folder: Path, case: ParityCase) -> None:
    """The bias that an expert's last linear returns beside its output is not added, as DeepSpeed's own layer does."""
    from megatron_specialm.engine.deepspeed.moe import _Expert

    def without(expert: _Expert, slots: torch.Tensor) -> torch.Tensor:
        output, _ = expert.network(slots.flatten(0, -2).unsqueeze(1))
        return output.view(slots.shape)

    with mock.patch.object(_Expert, "forward", without):
        measure(case, world, folder)


@contextlib.contextmanager
def _first_weights_of(other: Callable[[Any, int], int]) -> Iterator[None]:
    """Experts start with the weights of another: that of this index, given the module and the expert's own."""
    from megatron_specialm.engine.deepspeed.moe import DeepSpeedExperts
    from megatron_specialm.model.gpt import Gpt

    load, place = Gpt.load, DeepSpeedExperts.place

    def wrong(module: DeepSpeedExperts, name: str) -> tuple[str, int | None]:
        canonical, expert = place(module, name)
        return canonical, None if expert is None else other(module, expert)

    def load_wrongly(model: Gpt, tensors: dict[str, torch.Tensor]) -> None:
        with mock.patch.object(DeepSpeedExperts, "place", wrong):
            load(model, tensors)

    with mock.patch.object(Gpt, "load", load_wrongly):
        yield


def equal_experts(world: World, folder: Path, case: ParityCase) -> None:
    """All experts of a layer start as copies of the first, as DeepSpeed makes them."""
    with _first_weights_of(lambda *_: 0):
        measure(case, world, folder)


def same_experts_on_all(world: World, folder: Path, case: ParityCase) -> None:
    """Every process loads the experts of the first."""
    with _first_weights_of(lambda module, expert: expert - module._first):
        measure(case, world, folder)


EXPERTS = r"mlp\.experts\."
BEFORE_THE_LAST_ROUTER = r"^(?!decoder\.layers\.1\.mlp\.experts|decoder\.final_layernorm)"
FAULTY = Case(NEOX, {}, 2, {**DP2, **EP2})
FAULTS = [  # with the quantity in which it is seen, by which weights, and whether others differ less
    (experts_scaled_by_processes, "gradients", EXPERTS, False),
    (experts_not_in_the_norm, "norm_counts", EXPERTS, False),
    (auxiliary_losses_undivided, "gradients", BEFORE_THE_LAST_ROUTER, False),
    (no_expert_bias, "gradients", r"mlp\.experts\.linear_fc2\.bias", True),
    (equal_experts, "weights", EXPERTS + "linear_fc1.weight", True),
    (same_experts_on_all, "weights", EXPERTS + "linear_fc1.weight", True),
]


def _run(folder: Path, cases: Iterable[Case], faults: Iterable[Callable] = ()) -> Path:
    """All runs and their references, one folder each: those of a number of processes in one set of processes."""
    jobs = {str(case): (healthy, case.parity) for case in cases}
    jobs |= {_reference_name(case): (healthy, case.reference) for case in cases}
    for fault in faults:
        jobs |= {fault.__name__: (fault, FAULTY.parity), _reference_name(FAULTY): (healthy, FAULTY.reference)}
    for size in (1, 2, 4):
        own = [Job(name, act, (case,)) for name, (act, case) in jobs.items() if case.parallel.world_size == size]
        if own:
            run_jobs(folder, size, own)
    return folder


def _reference_name(case: Case) -> str:
    """One for equal references."""
    return f"reference-{hashlib.sha256(case.reference.model_dump_json().encode()).hexdigest()[:12]}"


def _compared(runs: Path, name: str, case: Case) -> list[Difference]:
    return differences_of(case.parity, read_outcome(runs / _reference_name(case)), read_outcome(runs / name))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("few"), FEW, [fault for fault, *_ in FAULTS])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("many"), MANY)


def _all_equal(runs: Path, case: Case) -> None:
    differences = _compared(runs, str(case), case)
    assert case.moe == BY_CLUSTER or "gates" in {difference.quantity for difference in differences}
    assert not [difference for difference in differences if not difference.passed]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_an_moe_equals_its_reference(few: Path, case: Case) -> None:
    _all_equal(few, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_so_it_does_in_other_layouts(many: Path, case: Case) -> None:
    _all_equal(many, case)


@pytest.mark.parametrize(
    ("fault", "quantity", "wrong", "further"), FAULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_planted_fault_is_found_and_its_places_named(
    few: Path, fault: Callable, quantity: str, wrong: str, further: bool
) -> None:
    """The fault reaches these weights alone, or, through loss and hidden states, others less (`further`)."""
    found = {entry.quantity: entry for entry in _compared(few, fault.__name__, FAULTY)}[quantity]
    expected = {name for name in found.by_place if re.search(wrong, name)}
    assert expected and expected <= set(found.failed)
    assert re.search(wrong, found.failed[0]) if further else set(found.failed) == expected


MOE = MixtureOfExperts(experts=4, ffn_hidden_size=32, shared_expert=32, z_loss=0.001, bias_update_rate=0.001)
SMALL = SHAPE.model_copy(update={"family": "llama", "moe": MOE})
SAVED, STEPS, KILLED_STEPS = 4, 12, 60
SETTINGS = {
    "model": SMALL, "steps": STEPS, "optimizer": {"learning_rate": 1e-3, "epsilon": EPSILON}, "micro_batch_size": 2,
    "checkpoint": {"every": SAVED, "keep": 99},
}  # fmt: skip


def _deepspeed(stage: int, **layout: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage, **layout}


PAIRS = [  # saved at one and continued at the other: engine, ZeRO stage, EP, DP and TP change
    ({**DP2, **EP2}, _deepspeed(2, **DP4, **EP4)),
    (_deepspeed(2, **DP2, **EP2), {**TP2, "sequence_parallel": True}),
    (_deepspeed(2, **DP4, **EP2), _deepspeed(1, **DP2)),
    (_deepspeed(1, **TP2, **DP2, **EP2), {**DP2, **EP2, "distributed_optimizer": True}),
    ({**TP2, "sequence_parallel": True, **DP2, **EP2}, _deepspeed(1, **DP2, **EP2, **OFFLOAD)),
]


def _train(world: World, folder: Path, layout: dict[str, Any]) -> None:
    run_training(folder, world, stage(**SETTINGS, parallel=layout))


def _name(layout: dict[str, Any]) -> str:
    return "-".join(f"{key}-{value}" for key, value in layout.items())


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every first layout's training, whole; then each pair's second part from its saved step."""
    folder = tmp_path_factory.mktemp("moved")
    straight = [Job(_name(before), _train, (before,)) for before, _ in PAIRS]
    further = [Job(f"{_name(before)}--{_name(after)}", _train, (after,)) for before, after in PAIRS]
    _by_size(folder, straight)
    for before, job in zip(straight, further, strict=True):
        shutil.copytree(step_folder(folder / before.name, SAVED), step_folder(folder / job.name, SAVED))
    _by_size(folder, further)
    return folder


def _by_size(folder: Path, jobs: list[Job]) -> None:
    for size in (2, 4):
        run_jobs(folder, size, [job for job in jobs if stage(parallel=job.arguments[0]).parallel.world_size == size])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=_name)
def test_training_goes_on_elsewhere_with_the_same_losses_and_optimizer(moved: Path, before: dict, after: dict) -> None:
    names = _name(before), f"{_name(before)}--{_name(after)}"
    one, other = (
        [record for record in read_metrics(moved / name) if "loss" in record and record["step"] > SAVED]
        for name in names
    )
    assert len(other) == STEPS - SAVED
    for field in ("loss", "gradient_norm"):
        assert [record[field] for record in other] == pytest.approx([record[field] for record in one], rel=1e-4)
    states = [open_checkpoint(step_folder(moved / name, STEPS)).optimizer_state for name in names]
    assert set(states[0]) == set(states[1])
    assert float(states[1]["step"][()]) == STEPS
    for name in set(states[0]) - {"step"}:
        scale = float(states[0][name][:].abs().max())
        torch.testing.assert_close(states[1][name][:], states[0][name][:], rtol=0, atol=1e-3 * scale)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    settings = {**SETTINGS, "steps": KILLED_STEPS, "parallel": _deepspeed(2, **DP2, **EP2)}
    ranks = start_ranks(tmp_path / "killed", **settings)
    deadline = time.monotonic() + 100
    while not any((tmp_path / "killed").glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    assert ranks.join()[0] == 1
    run_layout(tmp_path / "killed", **settings)
    run_layout(tmp_path / "straight", **settings)
    killed, straight = (open_checkpoint(step_folder(tmp_path / name, KILLED_STEPS)) for name in ("killed", "straight"))
    for one, other in ((killed.weights, straight.weights), (killed.optimizer_state, straight.optimizer_state)):
        assert set(one) == set(other)
        assert all(torch.equal(one[name][()], other[name][()]) for name in one)


def _evaluate(world: World, folder: Path, layout: dict[str, Any], precision: str) -> None:
    """Copies with unequal numbers of windows, none among them. Beside that, what DeepSpeed was given."""
    setup = Setup(SMALL, LAYOUTS[layout["engine"]](**layout), precision, VOCABULARY, CONTEXT, 8, 1)
    with open_engine(
        setup, world, optimizer=Optimizer(epsilon=EPSILON), initialize=lambda model: model.initialize(seed=0)
    ) as engine:
        rank, copies = engine.data_rank, engine.data_parallel
        batch = MemoryStore(8).batch(np.array_split(np.arange(8), copies)[rank])
        losses = []
        for windows in (1, 0, 3, 9):
            engine.train_step(batch, learning_rate=1e-2)
            held_out = MemoryStore(windows, seed=1)
            losses.append(
                engine.evaluate(held_out.batch(np.array([number])) for number in range(rank, windows, copies))[:2]
            )
        if layout["engine"] == "deepspeed":
            _check_groups(layout)
            for name, parameter, _ in engine._model.weights():
                assert parameter.dtype == (torch.float32 if "router" in name else torch.bfloat16), name
    (folder / f"{world.rank}.json").write_text(json.dumps(losses))


def _check_groups(layout: dict[str, Any]) -> None:
    """The groups are those that DeepSpeed would have made."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    name, rank = f"ep_size_{layout['expert_parallel']}", dist.get_rank()
    expected = groups._get_expert_parallel_ranks(
        dist.get_world_size(), layout.get("tensor_parallel", 1), layout["expert_parallel"]
    )
    for kind, ranks in zip(("", "data_"), expected, strict=True):
        own = getattr(groups, f"_get_expert_{kind}parallel_group")(name)
        assert dist.get_process_group_ranks(own) == next(part for part in ranks if rank in part)


def _learn(world: World, folder: Path, layout: dict[str, Any]) -> None:
    """A dense student, with an MoE teacher beside it."""
    setup = Setup(SHAPE, LAYOUTS[layout["engine"]](**layout), "fp32", VOCABULARY, CONTEXT, 8, 2, teacher=SMALL)
    specs = weight_specs(SMALL, vocabulary_size=VOCABULARY)
    with open_engine(
        setup, world, optimizer=Optimizer(epsilon=EPSILON), initialize=lambda model: model.initialize(seed=0),
        objective=Distillation(alpha=0.9, temperature=1.0, teacher="online"),
        teacher_weights={name: 10 * first_weight(name, spec, SMALL, seed=1)[...] for name, spec in specs.items()},
    ) as engine:  # fmt: skip
        own = MemoryStore(8).batch(np.array_split(np.arange(8), engine.data_parallel)[engine.data_rank])
        losses = [engine.train_step(own, learning_rate=1e-2).loss.mean for _ in range(4)]
    (folder / f"{world.rank}.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process of the Megatron engine and four of DeepSpeed's give."""
    folder = tmp_path_factory.mktemp("beside")
    for size, layout in ((1, {"engine": "megatron"}), (4, _deepspeed(2, **DP2, **TP2, **EP2))):
        jobs = [Job(f"evaluate-{size}", _evaluate, (layout, "bf16")), Job(f"learn-{size}", _learn, (layout,))]
        run_jobs(folder, size, jobs)
    return folder


def _said(folder: Path) -> list[Any]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    assert all(one == found[0] for one in found), "the same by all processes"
    return found[0]  # type: ignore[no-any-return]


def test_copies_evaluate_what_they_have(beside: Path) -> None:
    one, four = _said(beside / "evaluate-1"), _said(beside / "evaluate-4")
    for (total, tokens), (whole, counted) in zip(four, one, strict=True):
        assert tokens == counted
        assert total == pytest.approx(whole, rel=1e-2)


def test_an_moe_teaches_a_dense_student_beside_it(beside: Path) -> None:
    assert _said(beside / "learn-4") == pytest.approx(_said(beside / "learn-1"), rel=1e-5)
