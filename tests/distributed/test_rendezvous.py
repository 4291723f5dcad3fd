"""The rendezvous of ranks: missing ranks are named, every wait has a limit, and a signal takes effect at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import free_port

RANK = """
import sys
import torch.distributed
from megatron_specialm.base.environment import World
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.rendezvous import is_alive, rendezvous
rank, size, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
world = World(rank, size, rank, address, "test")
with ProcessStatus().stop_on_signals():
    print("ready", flush=True)
    sys.stdin.readline()
    rendezvous(world)
    print("all have arrived", flush=True)
    if rank:
        sys.stdin.read(1)
        print("rank 0 is alive" if is_alive(world) else "rank 0 has ended", flush=True)
"""


def _start(rank: int, size: int, address: str, *, seconds: float = 60) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(rank), str(size), address], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SPECIALM_RENDEZVOUS_SECONDS": str(seconds)},
    )  # fmt: skip


def _begin(*processes: subprocess.Popen) -> None:
    """Begin the rendezvous, once all processes have done their imports."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def _address() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_the_missing_are_named_and_the_wait_ends(tmp_path: Path, kind: str) -> None:
    address = _address() if kind == "tcp" else f"file://{tmp_path}/a #1%20?x"
    ranks = [_start(rank, 4, address, seconds=3) for rank in (0, 2)]
    _begin(*ranks)
    for rank, process in zip((0, 2), ranks, strict=True):
        _, errors = process.communicate(timeout=100)
        assert f"rank {rank} of 4 (test) has waited 3 s" in errors and "for ranks 1, 3:" in errors, errors


def test_a_rank_0_that_does_not_arrive_is_named() -> None:
    _, errors = _start(1, 2, _address(), seconds=1).communicate("go\n", timeout=100)
    assert "for rank 0, which has not opened it" in errors
    _, errors = _start(1, 2, "tcp://no-such-host.invalid:1", seconds=1).communicate("go\n", timeout=100)
    assert "for rank 0, which has not opened it" in errors


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_ends_the_wait(rank: int, number: signal.Signals) -> None:
    process = _start(rank, 2, _address(), seconds=600)
    _begin(process)
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert ("errors.Stopped: stopped by SIGTERM" if number == signal.SIGTERM else "KeyboardInterrupt") in errors, errors


def test_two_processes_of_the_same_rank(tmp_path: Path) -> None:
    ranks = [_start(1, 3, f"file://{tmp_path}/rendezvous", seconds=3) for _ in range(2)]
    _begin(*ranks)
    assert any("two processes are rank 1 of 3" in process.communicate(timeout=100)[1] for process in ranks)


def test_other_ranks_notice_the_end_of_rank_0() -> None:
    address = _address()
    first, second = _start(0, 2, address), _start(1, 2, address)
    _begin(first, second)
    assert "all have arrived" in first.communicate(timeout=100)[0]
    assert "rank 0 has ended" in second.communicate("x", timeout=100)[0]


WAIT = """
import sys
from pathlib import Path
from megatron_specialm.base.environment import World
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.run import inline
inline.GRACE_SECONDS = 0.5
pipeline = load_pipeline(configs_folder() / "pipelines" / "smoke.yaml")
task = build_graph(pipeline)[TaskId("tokenizer", "generic")]
planned = PlannedTask(task, "0" * 64, "to do", {})
inline.run_task(pipeline, Path(sys.argv[1]), planned, World(1, 2, 1, sys.argv[2], "test"), ProcessStatus())
"""


def test_no_rank_waits_for_a_rank_0_that_has_ended(tmp_path: Path) -> None:
    address = _address()
    first = _start(0, 2, address)
    _begin(first)
    second = subprocess.run(
        [sys.executable, "-c", WAIT, str(tmp_path), address], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert first.wait(100) == 0
    assert "tokenizer/generic: rank 0, whose work it is, has ended without finishing it" in second.stderr, second.stderr
