"""The rendezvous of ranks: missing ranks are named, every wait has a limit, and a signal takes effect at once."""

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from megatron_specialm.base.environment import World
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.rendezvous import SECONDS, is_alive, rendezvous
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run import inline
from tests.processes import free_port, rank_context


class Started:
    """A process of its own, forked after its imports. It talks with the test through a pipe; its errors go to a file."""

    def __init__(self, folder: Path, act: Callable[..., None], *arguments: Any) -> None:
        context = rank_context()
        self.pipe, theirs = context.Pipe()
        self._log = folder / f"log-{secrets.token_hex(4)}"
        self.process = context.Process(target=_act, args=(self._log, act, theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def says(self) -> Any:
        """The next that it sends, within the time limit."""
        assert self.pipe.poll(100)
        return self.pipe.recv()

    def errors(self) -> str:
        """What it has written by its end, within the time limit."""
        self.process.join(100)
        assert self.process.exitcode is not None
        return self._log.read_text()


def _act(log: Path, act: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    act(pipe, *arguments)


def _meet(pipe: Connection, rank: int, size: int, address: str, seconds: float) -> None:
    os.environ[SECONDS] = str(seconds)
    world = World(rank, size, rank, address, "test")
    with ProcessStatus().stop_on_signals():
        pipe.send("ready")
        pipe.recv()
        rendezvous(world)
        pipe.send("all have arrived")
        if rank:
            pipe.recv()
            pipe.send("rank 0 is alive" if is_alive(world) else "rank 0 has ended")


def _start(folder: Path, rank: int, size: int, address: str, *, seconds: float = 60) -> Started:
    return Started(folder, _meet, rank, size, address, seconds)


def _begin(*ranks: Started) -> None:
    """Begin the rendezvous, once all processes are there."""
    for rank in ranks:
        assert rank.says() == "ready"
    for rank in ranks:
        rank.pipe.send("go")


def _address() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_the_missing_are_named_and_the_wait_ends(tmp_path: Path, kind: str) -> None:
    address = _address() if kind == "tcp" else f"file://{tmp_path}/a #1%20?x"
    limits = {2: 3, 0: 10}  # rank 0 has the store, so it waits longest
    ranks = {rank: _start(tmp_path, rank, 4, address, seconds=seconds) for rank, seconds in limits.items()}
    _begin(*ranks.values())
    for rank, process in ranks.items():
        errors = process.errors()
        told = f"rank {rank} of 4 (test) has waited {limits[rank]} s"
        assert told in errors and "for ranks 1, 3:" in errors, errors


def test_a_rank_0_that_does_not_arrive_is_named(tmp_path: Path) -> None:
    for address in (_address(), "tcp://no-such-host.invalid:1"):
        _begin(rank := _start(tmp_path, 1, 2, address, seconds=1))
        assert "for rank 0, which has not opened it" in rank.errors()


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_ends_the_wait(tmp_path: Path, rank: int, number: signal.Signals) -> None:
    waiting = _start(tmp_path, rank, 2, _address(), seconds=600)
    _begin(waiting)
    time.sleep(1)
    os.kill(waiting.process.pid, number)
    errors = waiting.errors()
    assert ("errors.Stopped: stopped by SIGTERM" if number == signal.SIGTERM else "KeyboardInterrupt") in errors, errors


def test_two_processes_of_the_same_rank(tmp_path: Path) -> None:
    ranks = [_start(tmp_path, 1, 3, f"file://{tmp_path}/rendezvous", seconds=3) for _ in range(2)]
    _begin(*ranks)
    assert any("two processes are rank 1 of 3" in rank.errors() for rank in ranks)


def test_other_ranks_notice_the_end_of_rank_0(tmp_path: Path) -> None:
    address = _address()
    first, second = (_start(tmp_path, rank, 2, address) for rank in (0, 1))
    _begin(first, second)
    assert first.says() == second.says() == "all have arrived"
    first.errors()  # it ends
    second.pipe.send("look")
    assert second.says() == "rank 0 has ended"


def _wait_for_rank_0(_: Connection, folder: Path, address: str) -> None:
    inline.GRACE_SECONDS = 0.5
    pipeline = load_pipeline(configs_folder() / "pipelines" / "smoke.yaml")
    task = build_graph(pipeline)[TaskId("tokenizer", "generic")]
    planned = PlannedTask(task, "0" * 64, "to do", {})
    inline.run_task(pipeline, folder, planned, World(1, 2, 1, address, "test"), ProcessStatus())


def test_no_rank_waits_for_a_rank_0_that_has_ended(tmp_path: Path) -> None:
    address = _address()
    first = _start(tmp_path, 0, 2, address)
    _begin(first)
    second = Started(tmp_path, _wait_for_rank_0, tmp_path, address)
    errors = first.errors()
    assert first.process.exitcode == 0, errors
    errors = second.errors()
    assert "tokenizer/generic: rank 0, whose work it is, has ended without finishing it" in errors, errors
