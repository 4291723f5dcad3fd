"""One process is asked to stop, and all of them do, at the same step, with nothing lost: the end is the same to the bit."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_specialm.base.errors import Stopped
from megatron_specialm.checkpoint.opening import newest_checkpoint, read_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from tests.training import Ranks, read_metrics, run_layout, start_ranks

LAYOUTS = [{"data_parallel": 2, "distributed_optimizer": True}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}]
ENDLESS = 100_000  # under a constant learning rate: what a step does is the same in a run of any length


def _wait_for(happens: Callable[[], bool], ranks: Ranks) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline and all(process.is_alive() for process in ranks.processes)
        time.sleep(0.002)


def _losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]


def _stop(folder: Path, ranks: Ranks, rank: int) -> int:
    """Ask one rank; the step that was saved."""
    os.kill(ranks.processes[rank].pid, signal.SIGTERM)
    assert ranks.join(60) == [Stopped.exit_code] * 2
    saved, passed_over = newest_checkpoint(folder)
    assert saved is not None and not passed_over
    step = int(saved.name.removeprefix("step_"))
    stop = read_metrics(folder)[-1]
    assert (stop["event"], stop["step"]) == ("stop", step)
    assert all(f"stopped at step {step}, saved in {saved}" in (folder / f"log-{rank}").read_text() for rank in (0, 1))
    return step


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_asked_all_stop_and_the_end_is_the_same(tmp_path: Path, layout: dict) -> None:
    settings = {"steps": ENDLESS, "micro_batch_size": 4, "parallel": layout, "checkpoint": {"every": 10_000}}
    broken = tmp_path / "broken"
    ranks = start_ranks(broken, **settings)
    _wait_for(lambda: (broken / "metrics.jsonl").exists() and len(_losses(broken)) > 5, ranks)
    settings["steps"] = _stop(broken, ranks, rank=1) + 5
    run_layout(broken, **settings)
    run_layout(tmp_path / "straight", **settings)
    straight, resumed = (read_checkpoint(find_final(folder)).weights for folder in (tmp_path / "straight", broken))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert _losses(broken) == _losses(tmp_path / "straight")


@pytest.mark.parametrize("rank", [0, 1])
def test_asked_in_the_middle_of_a_save(tmp_path: Path, rank: int) -> None:
    settings = {"steps": ENDLESS, "micro_batch_size": 1, "parallel": {"tensor_parallel": 2}, "checkpoint": {"every": 1}}
    ranks = start_ranks(tmp_path, **settings)
    _wait_for(lambda: any(tmp_path.glob("step_*")), ranks)
    _wait_for(lambda: any(tmp_path.glob(".step_*.tmp")), ranks)
    step = _stop(tmp_path, ranks, rank)
    assert not any(tmp_path.glob(".step_*.tmp"))
    run_layout(tmp_path, **{**settings, "steps": step + 3})
    assert len(_losses(tmp_path)) == step + 3
