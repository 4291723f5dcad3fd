import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import Stopped, TrainingError
from megatron_specialm.base.lifeline import Lifeline
from megatron_specialm.train.checkpoint import find_final, read_model
from megatron_specialm.train.losses import DeviceBatch, cross_entropy
from megatron_specialm.train.metrics import Metrics, read_metrics, seconds_of_all_attempts
from tests.training import run_training, stage


def _final(folder: Path) -> dict[str, torch.Tensor]:
    return read_model(find_final(folder))


def test_training_learns_and_records(tmp_path: Path) -> None:
    progress = run_training(tmp_path, ALONE, stage(steps=40))
    losses = [record["loss"] for record in read_metrics(tmp_path) if "loss" in record]
    assert progress.step == 40 and len(losses) == 40
    assert losses[-1] < 0.85 * losses[0]
    assert (tmp_path / "latest").read_text().strip() == "step_0000040"


def test_resumed_from_any_checkpoint_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    run_training(tmp_path / "straight", ALONE, stage(checkpoint={"every": 4, "keep": 10}))
    for lost in (4, 8, 12):
        broken = tmp_path / f"broken{lost}"
        shutil.copytree(tmp_path / "straight", broken)
        (broken / "result.json").unlink()
        for step in range(lost, 13, 4):
            shutil.rmtree(broken / f"step_{step:07d}")
        run_training(broken, ALONE, stage())
        straight, resumed = _final(tmp_path / "straight"), _final(broken)
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    settings = stage(steps=400, optimizer={"learning_rate": 3e-2}, early_stopping={"evaluate_every": 4, "patience": 2})
    progress = run_training(tmp_path, ALONE, settings, windows=8)
    losses = {r["step"]: r["validation_loss"] for r in read_metrics(tmp_path) if "validation_loss" in r}
    assert progress.step < 400, "eight windows must be learnt by heart long before"
    assert progress.best_step == min(losses, key=losses.get)
    assert progress.step == progress.best_step + 2 * 4
    assert find_final(tmp_path).name == f"step_{progress.best_step:07d}"


def test_a_poisoned_run_stops_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    calls = iter(range(10_000))

    def poisoned(logits: torch.Tensor, batch: DeviceBatch, **share: Any) -> torch.Tensor:
        return cross_entropy(logits, batch, **share) * (float("nan") if next(calls) >= 12 else 1.0)

    with pytest.raises(TrainingError, match=r"not finite for 3 steps.*step_0000008.*learning_rate"):
        run_training(tmp_path, ALONE, stage(max_skipped_steps=2), objective=poisoned)
    skipped = [record for record in read_metrics(tmp_path) if record.get("skipped_steps")]
    assert [record["loss"] for record in skipped] == [None] * 3


def test_seconds_count_every_attempt(tmp_path: Path) -> None:
    records = [{"event": "start", "time": 10.0}, {"time": 14.0}, {"event": "start", "time": 100.0}, {"time": 101.0}]
    assert seconds_of_all_attempts(records) == 5.0


def test_a_torn_record_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"time": 1.0, "event": "start"}\n{"time": 2.0, "st')
    Metrics(tmp_path, step=3).close()
    assert [record.get("step") for record in read_metrics(tmp_path)] == [None, 3]


def _stopped_at(folder: Path, step: int, **settings: Any) -> str:
    """Train, with a signal while the step after `step` is computed; what is said of it."""
    lifeline, calls = Lifeline(), iter(range(10_000))

    def signalled(logits: torch.Tensor, batch: DeviceBatch, **share: Any) -> torch.Tensor:
        if next(calls) == 2 * (step - 1):  # two micro-batches a step
            os.kill(os.getpid(), signal.SIGUSR1)
        return cross_entropy(logits, batch, **share)

    with lifeline.hearing_signals(), lifeline.at_step_boundaries(), pytest.raises(Stopped) as stopped:
        run_training(folder, ALONE, stage(**settings), objective=signalled, lifeline=lifeline)
    return str(stopped.value)


@pytest.mark.parametrize("every", [3, 4, 100])  # the step at which it stops is saved before, or not, or nothing is
def test_asked_to_stop_it_saves_its_step_and_goes_on_to_the_same_bits(tmp_path: Path, every: int) -> None:
    run_training(tmp_path / "straight", ALONE, stage())
    broken = tmp_path / "broken"
    said = _stopped_at(broken, 5, checkpoint={"every": every})
    stop = read_metrics(broken)[-1]
    assert stop["event"] == "stop" and stop["step"] in (5, 6)
    assert f"stopped at step {stop['step']}, saved in {broken}/step_000000{stop['step']}" in said
    assert (broken / "latest").read_text().strip() == f"step_{stop['step']:07d}" and not (
        broken / "result.json"
    ).exists()
    run_training(broken, ALONE, stage())
    straight, resumed = _final(tmp_path / "straight"), _final(broken)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    losses = [[r["loss"] for r in read_metrics(folder) if "loss" in r] for folder in (tmp_path / "straight", broken)]
    assert losses[0] == losses[1]


def test_asked_before_the_first_step_it_saves_nothing(tmp_path: Path) -> None:
    asked = Lifeline()
    asked.stop_asked_by = "SIGTERM"
    with pytest.raises(Stopped, match="before the first step"):
        run_training(tmp_path, ALONE, stage(), lifeline=asked)
    assert not list(tmp_path.glob("*step_*"))
    run_training(tmp_path, ALONE, stage(steps=4))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("step_*"))
    with pytest.raises(Stopped, match="at step 4, saved in"):
        run_training(tmp_path, ALONE, stage(), lifeline=asked)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.glob("step_*")) == before


def test_asked_in_the_last_step_it_ends(tmp_path: Path) -> None:
    lifeline = Lifeline()
    with lifeline.at_step_boundaries():
        calls = iter(range(10_000))

        def asking(logits: torch.Tensor, batch: DeviceBatch, **share: Any) -> torch.Tensor:
            if next(calls) == 2 * 11:
                lifeline.ask_to_stop("a test")
            return cross_entropy(logits, batch, **share)

        assert run_training(tmp_path, ALONE, stage(), objective=asking, lifeline=lifeline).step == 12
