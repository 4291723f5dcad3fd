"""Training by the DeepSpeed engine: checkpoints move between engines and layouts, a killed run goes on, steps are skipped."""

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_specialm.base.environment import World
from megatron_specialm.checkpoint.opening import open_checkpoint
from megatron_specialm.checkpoint.steps import step_folder
from megatron_specialm.config.parallel import LAYOUTS
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import Batch
from megatron_specialm.engine import state as engine_state
from megatron_specialm.engine.objective import DeviceBatch, VocabularyShard, cross_entropy
from megatron_specialm.engine.open import open_engine
from megatron_specialm.engine.protocol import Engine
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.initial import first_value
from megatron_specialm.model.weights import weight_specs
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

SAVED, STEPS, KILLED_STEPS = 4, 16, 60
SETTINGS = {
    "model": SHAPE.model_copy(update={"layers": 3}), "steps": STEPS, "micro_batch_size": 2,
    "optimizer": {"learning_rate": 1e-3, "epsilon": EPSILON}, "checkpoint": {"every": SAVED, "keep": 99},
}  # fmt: skip


def _deepspeed(stage: int, **layout: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "zero_stage": stage, **layout}


DP2, TP2 = {"data_parallel": 2}, {"tensor_parallel": 2}
PAIRS = [  # saved at one and continued at the other: engine, ZeRO stage, DP and TP change
    (_deepspeed(1, **DP2), _deepspeed(2, **TP2)),
    (_deepspeed(3, **DP2), _deepspeed(0, **TP2)),
    (_deepspeed(0, **DP2), _deepspeed(3, **DP2)),
    (_deepspeed(2, **DP2), {"pipeline_parallel": 2}),
    (_deepspeed(1, **TP2), {**DP2, "distributed_optimizer": True}),
    ({**DP2, "distributed_optimizer": True}, _deepspeed(3, **DP2)),
    ({**TP2, "sequence_parallel": True}, _deepspeed(2, **DP2, offload_optimizer=True)),
    ({"pipeline_parallel": 2}, _deepspeed(1, **DP2, **TP2)),
    (_deepspeed(3, **DP2, **TP2), _deepspeed(1, **DP2)),
]


def _train(world: World, folder: Path, layout: dict[str, Any]) -> None:
    run_training(folder, world, stage(**SETTINGS, parallel=layout))


def _name(layout: dict[str, Any]) -> str:
    return "-".join(f"{key}-{value}" for key, value in layout.items())


def _size(layout: dict[str, Any]) -> int:
    return stage(parallel=layout).parallel.world_size


def _losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if "loss" in record and record["step"] > SAVED]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every first layout's training, whole; then each pair's second part from its saved step. Layouts of the same number of
    processes share them."""
    folder = tmp_path_factory.mktemp("runs")
    straight = {_name(before): before for before, _ in PAIRS}
    moved = {f"{_name(before)}--{_name(after)}": (before, after) for before, after in PAIRS}
    for size in (2, 4):
        run_jobs(folder, size, [Job(name, _train, (of,)) for name, of in straight.items() if _size(of) == size])
    for name, (before, _) in moved.items():
        shutil.copytree(step_folder(folder / _name(before), SAVED), step_folder(folder / name, SAVED))
    for size in (2, 4):
        run_jobs(
            folder, size, [Job(name, _train, (after,)) for name, (_, after) in moved.items() if _size(after) == size]
        )
    return folder


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=_name)
def test_training_goes_on_elsewhere_with_the_same_loss(runs: Path, before: dict, after: dict) -> None:
    moved = _losses(runs / f"{_name(before)}--{_name(after)}")
    assert len(moved) == STEPS - SAVED
    assert moved == pytest.approx(_losses(runs / _name(before)), rel=1e-5)


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=_name)
def test_so_does_the_optimizer(runs: Path, before: dict, after: dict) -> None:
    """Whole canonical tensors, without padding; moments that continued, not those of a new Adam."""
    one, other = (
        open_checkpoint(step_folder(runs / name, STEPS)).optimizer_state
        for name in (_name(before), f"{_name(before)}--{_name(after)}")
    )
    assert set(one) == set(other)
    assert float(one["step"][()]) == float(other["step"][()]) == STEPS
    for name in set(one) - {"step"}:
        scale = float(one[name][:].abs().max())
        torch.testing.assert_close(other[name][:], one[name][:], rtol=0, atol=1e-3 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path, zero_stage: int) -> None:
    settings = {**SETTINGS, "steps": KILLED_STEPS, "parallel": _deepspeed(zero_stage, **DP2)}
    ranks = start_ranks(tmp_path / "killed", **settings)
    deadline = time.monotonic() + 100
    while not any((tmp_path / "killed").glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    assert ranks.join()[0] == 1
    assert "another process of this training has died" in (tmp_path / "killed" / "log-0").read_text()
    run_layout(tmp_path / "killed", **settings)
    run_layout(tmp_path / "straight", **settings)
    killed, straight = (open_checkpoint(step_folder(tmp_path / name, KILLED_STEPS)) for name in ("killed", "straight"))
    for one, other in ((killed.weights, straight.weights), (killed.optimizer_state, straight.optimizer_state)):
        assert set(one) == set(other)
        assert all(torch.equal(one[name][()], other[name][()]) for name in one)


class Scaled:
    """Cross-entropy times a factor."""

    factor = 1.0

    def __call__(
        self, logits_TBV: torch.Tensor, batch: DeviceBatch, *, shard: VocabularyShard | None = None
    ) -> torch.Tensor:
        return cross_entropy(logits_TBV, batch, shard=shard) * self.factor


def _evaluate_and_skip(world: World, folder: Path, layout: dict[str, Any], precision: str) -> None:
    """Copies with unequal numbers of windows, none among them; a loss and a gradient that are not finite."""
    setup = Setup(SHAPE, LAYOUTS[layout["engine"]](**layout), precision, VOCABULARY, CONTEXT, 8, 1)
    settings, broken = Optimizer(epsilon=EPSILON), Scaled()
    with open_engine(
        setup, world, optimizer=settings, initialize=lambda model: model.initialize(seed=0), objective=broken
    ) as engine:
        own = np.array_split(np.arange(8), engine.data_parallel)[engine.data_rank]
        batch = MemoryStore(8).batch(own)
        losses = []
        for windows in (1, 0, 3, 9):
            engine.train_step(batch, learning_rate=1e-2)
            held_out = MemoryStore(windows, seed=1)
            parts = (
                held_out.batch(np.array([number])) for number in range(engine.data_rank, windows, engine.data_parallel)
            )
            losses.append(engine.evaluate(parts)[:2])
        before, state = engine.weights(), engine.optimizer_state()
        loss = engine.accumulate_gradients(batch)
        skipped = [engine.apply_gradients(loss._replace(total=float("nan")), learning_rate=1e-2).skipped]
        broken.factor = float("nan") if engine.data_rank == 0 else 1.0  # one copy's gradients are not finite
        loss = engine.accumulate_gradients(batch)
        skipped.append(engine.apply_gradients(loss._replace(total=1.0), learning_rate=1e-2).skipped)
        broken.factor = 1.0
        assert skipped == [True, True], skipped
        for one, other in ((before, engine.weights()), (state, engine.optimizer_state())):
            assert all(torch.equal(one[name], other[name]) for name in one)
        losses.append(engine.train_step(batch, learning_rate=1e-2).loss[:2])
        trained = engine.passes.trained
        _copy_late(engine, batch)
    (folder / f"{world.rank}.json").write_text(json.dumps({"losses": losses, "trained": trained}))


def _copy_late(engine: Engine, batch: Batch) -> None:
    """A step does not change what is still to be copied."""
    expected = engine.weights(), engine.optimizer_state()
    copied = engine_state._copied

    def late(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        time.sleep(0.5)
        return copied(tensors)

    with mock.patch.object(engine_state, "_copied", late):
        copying = engine.begin_copy()
        engine.train_step(batch, learning_rate=1e-2)
    for before, copy in zip(expected, copying.result(), strict=True):
        assert before.keys() == copy.keys() and all(torch.equal(before[name], copy[name]) for name in before)


TEACHER = SHAPE.model_copy(update={"family": "llama", "layers": 3})


def _distill(world: World, folder: Path, layout: dict[str, Any]) -> None:
    """A teacher of another family beside the student."""
    setup = Setup(SHAPE, LAYOUTS[layout["engine"]](**layout), "fp32", VOCABULARY, CONTEXT, 8, 2, teacher=TEACHER)
    specs = weight_specs(TEACHER, vocabulary_size=VOCABULARY)
    teacher = {name: 5 * first_value(name, spec.shape, TEACHER, seed=1) for name, spec in specs.items()}
    with open_engine(
        setup, world, optimizer=Optimizer(epsilon=EPSILON), initialize=lambda model: model.initialize(seed=0),
        objective=Distillation(alpha=0.6, temperature=2.0, teacher="online"), teacher_weights=teacher,
    ) as engine:  # fmt: skip
        batch = MemoryStore(8).batch(np.array_split(np.arange(8), engine.data_parallel)[engine.data_rank])
        losses = [engine.train_step(batch, learning_rate=1e-2).loss for _ in range(4)]
    (folder / f"{world.rank}.json").write_text(json.dumps(losses))


TAUGHT = [_deepspeed(1, **DP2), _deepspeed(3, **DP2), _deepspeed(2, **TP2)]
OVERLAPPED = {"engine": "megatron", **DP2, "distributed_optimizer": True, "overlap_communication": True}
ENGINES = [
    (OVERLAPPED, "fp32"),
    *((_deepspeed(number, **DP2), "fp32") for number in (0, 1, 2, 3)),
    *((_deepspeed(number, **DP2), "bf16") for number in (1, 3)),
]


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    one = [
        Job(f"one-{precision}", _evaluate_and_skip, ({"engine": "megatron"}, precision))
        for precision in ("fp32", "bf16")
    ]
    taught = [Job(f"taught-{_name(of)}", _distill, (of,)) for of in TAUGHT]
    run_jobs(folder, 1, [*one, Job("taught-one", _distill, ({"engine": "megatron"},))])
    run_jobs(
        folder, 2, [*(Job(f"{_name(of)}-{kind}", _evaluate_and_skip, (of, kind)) for of, kind in ENGINES), *taught]
    )
    return folder


@pytest.mark.parametrize(("layout", "precision"), ENGINES, ids=str)
def test_copies_evaluate_what_they_have_and_skip_together(evaluations: Path, layout: dict, precision: str) -> None:
    expected = json.loads((evaluations / f"one-{precision}" / "0.json").read_text())
    found = [
        json.loads((evaluations / f"{_name(layout)}-{precision}" / f"{rank}.json").read_text()) for rank in range(2)
    ]
    assert found[0]["losses"] == found[1]["losses"], "one loss for all processes"
    for (total, tokens), (whole, counted) in zip(found[0]["losses"], expected["losses"], strict=True):
        assert tokens == counted
        assert total == pytest.approx(whole, rel=1e-5 if precision == "fp32" else 3e-3)
    assert found[0]["trained"] == expected["trained"]


@pytest.mark.parametrize("layout", TAUGHT, ids=_name)
def test_a_teacher_runs_beside_the_student(evaluations: Path, layout: dict) -> None:
    expected, *found = (
        json.loads((evaluations / name).read_text())
        for name in ("taught-one/0.json", f"taught-{_name(layout)}/0.json", f"taught-{_name(layout)}/1.json")
    )
    for losses in found:
        assert [tokens for _, tokens, *_ in losses] == [tokens for _, tokens, *_ in expected]
        assert [total for total, *_ in losses] == pytest.approx([total for total, *_ in expected], rel=1e-5)
