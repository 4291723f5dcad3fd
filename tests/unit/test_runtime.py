"""What the loop does beside its steps: trackers, profiles, Python's garbage collector."""

import gc
import gzip
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import TrainingError
from megatron_specialm.base.integrity import PROFILES, list_files
from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.objective import DeviceBatch, cross_entropy
from tests.training import run_training, stage

# In the place of the package that talks to a service: it writes down what it is told.
WANDB = """
from pathlib import Path

class _Run:
    def __init__(self, folder):
        self._file = Path(folder, "wandb.txt").open("a")
    def log(self, scalars, *, step):
        print("log", step, file=self._file, flush=True)
    def finish(self, *, exit_code):
        print("finish", exit_code, file=self._file, flush=True)

def init(*, dir, **settings):
    return _Run(dir)
"""


def _diverging(logits: torch.Tensor, batch: DeviceBatch, **shard: Any) -> torch.Tensor:
    return cross_entropy(logits, batch, **shard) * float("nan")


@pytest.mark.parametrize(("objective", "code"), [(cross_entropy, 0), (_diverging, 1)])
def test_trackers_are_closed_also_when_a_training_diverges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: Any, code: int
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    settings = stage(steps=3, max_skipped_steps=1, tensorboard=True, wandb_project="project")
    if code:
        with pytest.raises(TrainingError, match="not finite"):
            run_training(tmp_path / "run", ALONE, settings, objective=objective)
    else:
        run_training(tmp_path / "run", ALONE, settings, objective=objective)
    sys.modules.pop("wandb")
    assert (tmp_path / "run/wandb.txt").read_text().splitlines()[-1] == f"finish {code}"
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert b"learning_rate" in events.read_bytes(), "what the writer held back is on the disk"


def test_chosen_steps_are_profiled_and_nothing_else_changes(tmp_path: Path) -> None:
    run_training(tmp_path / "plain", ALONE, stage(steps=3))
    runtime = {"profile_steps": [2, 3], "memory_snapshot_steps": [2]}  # of which a CPU has none
    run_training(tmp_path / "profiled", ALONE, stage(steps=3, runtime=runtime))
    traces = sorted((tmp_path / "profiled" / PROFILES).iterdir())
    assert [path.name for path in traces] == [f"step_000000{step}-rank_00000.json.gz" for step in (2, 3)]
    with gzip.open(traces[0]) as file:
        assert any("aten::mm" in event.get("name", "") for event in json.load(file)["traceEvents"])
    plain, profiled = (read_checkpoint(find_final(tmp_path / name)).weights for name in ("plain", "profiled"))
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)
    assert list_files(tmp_path / "plain").keys() == list_files(tmp_path / "profiled").keys()


@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_runs_between_steps_only(tmp_path: Path, fails: bool) -> None:
    collections: list[str] = []
    seen: list[bool] = []

    def objective(logits: torch.Tensor, batch: DeviceBatch, **shard: Any) -> torch.Tensor:
        seen.append(gc.isenabled())
        if fails and len(seen) == 9:
            raise OSError("an error")
        return cross_entropy(logits, batch, **shard)

    def collected(phase: str, _: dict[str, int]) -> None:
        if seen and phase == "start":
            collections.append(f"after {len(seen)} micro-batches")

    gc.unfreeze()  # as in a process that has exempted nothing
    gc.callbacks.append(collected)
    settings = stage(steps=5, runtime={"collect_garbage_every": 2})  # of two micro-batches each
    try:
        if fails:
            with pytest.raises(OSError, match="an error"):
                run_training(tmp_path, ALONE, settings, objective=objective)
        else:
            run_training(tmp_path, ALONE, settings, objective=objective)
    finally:
        gc.callbacks.remove(collected)
        frozen = gc.get_freeze_count()
        gc.freeze()
    assert not any(seen) and gc.isenabled() and not frozen
    assert collections[:2] == ["after 4 micro-batches", "after 8 micro-batches"]


def test_a_second_training_of_a_process_has_the_memory_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine is in a reference cycle, and the collector does not run by itself while a training does."""
    alive: list[weakref.ref[MegatronEngine]] = []
    monkeypatch.setattr(MegatronEngine, "limit_collectives", lambda engine, _: alive.append(weakref.ref(engine)))
    for number in range(4):
        run_training(tmp_path / str(number), ALONE, stage(steps=2))
    assert len(alive) == 4 and sum(engine() is not None for engine in alive) <= 1
