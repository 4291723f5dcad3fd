"""Fencing: a training on a node that is cut off but alive continues after its job's second attempt, and changes nothing."""

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_specialm.base.artifacts import (
    MARKER,
    Cost,
    Marker,
    artifact_link,
    begin_artifact,
    finish_artifact,
    is_complete,
)
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.files import read_json
from megatron_specialm.base.protocol import FENCING_TOKEN
from megatron_specialm.checkpoint.opening import newest_checkpoint
from tests.processes import rank_context
from tests.training import run_training, stage


def _train(root: Path, token: str | None, steps: int, before_the_marker: Connection | None = None) -> None:
    """An attempt at a training, with its errors in a file. It may wait for a word before it writes the marker."""
    with (root / f"log-{os.getpid()}").open("wb") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    if token is not None:
        os.environ[FENCING_TOKEN] = token
    folder = begin_artifact(root, "slm", "generic", digest="d")
    run_training(folder, ALONE, stage(steps=steps, checkpoint={"every": 20}))
    if before_the_marker is not None:
        before_the_marker.recv()
    finish_artifact(root, "slm", "generic", Marker("d", Cost(0, 0, 1.0, 1.0, "cpu", 1), {}, {}))


def _take_over(root: Path) -> None:
    begin_artifact(root, "slm", "generic", digest="d")


def _attempt(root: Path, number: int, *, steps: int) -> BaseProcess:
    process = rank_context().Process(target=_train, args=(root, f"123_0/{number}", steps), daemon=True)
    process.start()
    return process


def _errors(root: Path, process: BaseProcess) -> str:
    """What it has written by its end, within the time limit."""
    process.join(100)
    assert process.exitcode is not None
    return (root / f"log-{process.pid}").read_text()


def _freeze_outside_of_a_save(process: BaseProcess, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        if any(folder.glob("step_*")) and not any(folder.glob(".step_*.tmp")):
            return
        os.kill(process.pid, signal.SIGCONT)


def test_an_attempt_that_was_taken_over_publishes_nothing(tmp_path: Path) -> None:
    folder = artifact_link(tmp_path, "slm", "generic")
    cut_off = _attempt(tmp_path, 0, steps=100_000)
    try:
        _freeze_outside_of_a_save(cut_off, folder)
        newest, _ = newest_checkpoint(folder)
        assert newest is not None
        end = int(newest.name.removeprefix("step_")) + 10
        second = _attempt(tmp_path, 1, steps=end)
        errors = _errors(tmp_path, second)
        assert second.exitcode == 0, errors
        os.kill(cut_off.pid, signal.SIGCONT)
        errors = _errors(tmp_path, cut_off)
    finally:
        cut_off.kill()
        cut_off.join()
    assert cut_off.exitcode == 1
    assert "ArtifactError" in errors and "another attempt at this task, 123_0/1, has taken over from 123_0/0" in errors
    assert is_complete(tmp_path, "slm", "generic", digest="d") and read_json(folder / "result.json")["step"] == end
    newest, passed_over = newest_checkpoint(folder)
    assert newest == folder / f"step_{end:07d}" and not passed_over
    assert not any(folder.glob(".step_*.tmp"))


def test_an_attempt_that_has_trained_to_its_end_cannot_write_the_marker(tmp_path: Path) -> None:
    context = rank_context()
    pipe, theirs = context.Pipe()
    first = context.Process(target=_train, args=(tmp_path, None, 2, theirs), daemon=True)
    first.start()
    try:
        deadline = time.monotonic() + 100
        while not (artifact_link(tmp_path, "slm", "generic") / "result.json").exists():
            assert time.monotonic() < deadline and first.is_alive()
            time.sleep(0.01)
        second = context.Process(target=_take_over, args=(tmp_path,), daemon=True)
        second.start()
        second.join(100)
        assert second.exitcode == 0
        pipe.send("go on")
        errors = _errors(tmp_path, first)
    finally:
        first.kill()
        first.join()
    assert first.exitcode == 1 and f"has taken over from {first.pid}@" in errors
    assert not (artifact_link(tmp_path, "slm", "generic") / MARKER).exists()
