"""A process that dies takes no other with it into silence: each says what is lost and what is not."""

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_specialm.checkpoint.opening import newest_checkpoint
from tests.training import Ranks, run_layout, start_ranks

SETTINGS = {"steps": 100_000, "micro_batch_size": 1, "checkpoint": {"every": 5}}


def _wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} in {folder}"
        time.sleep(0.005)


def _outlived(ranks: Ranks, killed: int) -> list[int | None]:
    codes = ranks.join()
    return [code for rank, code in enumerate(codes) if rank != killed]


@pytest.mark.parametrize(
    ("layout", "killed"),
    [
        ({"tensor_parallel": 2}, 1),
        ({"pipeline_parallel": 2}, 0),
        ({"pipeline_parallel": 2}, 1),
        ({"tensor_parallel": 2, "pipeline_parallel": 2}, 3),
        ({"data_parallel": 2, "distributed_optimizer": True}, 1),
    ],
    ids=str,
)
def test_the_others_say_so_and_name_the_last_good_checkpoint(tmp_path: Path, layout: dict, killed: int) -> None:
    ranks = start_ranks(tmp_path, **SETTINGS, parallel=layout)
    _wait_for(tmp_path, "step_*")
    os.kill(ranks.processes[killed].pid, signal.SIGKILL)
    assert set(_outlived(ranks, killed)) == {1}
    for rank in range(len(ranks.processes)):
        if rank != killed:
            said = (tmp_path / f"log-{rank}").read_text()
            assert "TrainingError" in said and "another process of this training has died" in said
            assert "the last good checkpoint is" in said
    last, _ = newest_checkpoint(tmp_path)
    assert last is not None
    step = int(last.name.removeprefix("step_"))
    run_layout(tmp_path, **{**SETTINGS, "steps": step + 2}, parallel=layout)  # the same command goes on
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_dies_in_a_save_leaves_the_step_before(tmp_path: Path, killed: int) -> None:
    settings = {**SETTINGS, "checkpoint": {"every": 1}}
    ranks = start_ranks(tmp_path, **settings, parallel={"tensor_parallel": 2})
    _wait_for(tmp_path, "step_*")
    _wait_for(tmp_path, ".step_*.tmp")
    os.kill(ranks.processes[killed].pid, signal.SIGKILL)
    assert set(_outlived(ranks, killed)) == {1}
    last, _ = newest_checkpoint(tmp_path)
    assert last is not None
    step = int(last.name.removeprefix("step_"))
    run_layout(tmp_path, **{**settings, "steps": step + 1}, parallel={"pipeline_parallel": 2})
    assert (tmp_path / "result.json").exists()
