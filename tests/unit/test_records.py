"""The run folder's memory of its Slurm jobs, and the lock that guards it."""

import errno
import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_specialm.base.errors import ArtifactError, MachineError
from megatron_specialm.base.files import write_json
from megatron_specialm.base.lock import hold_folder
from megatron_specialm.slurm.records import (
    NOTE,
    Attempt,
    AttemptBegin,
    AttemptEnd,
    JobRecord,
    Note,
    TaskRecord,
    attempt_folder,
    read_attempts,
    read_registry,
    record_begin,
    record_end,
    registry_path,
    write_note,
    write_registry,
)

JOB = JobRecord(
    submission="0001", name="tuned", stage="tuned", slurm_id="17", comment="specialm-1f", after=("15", "16"),
    elements=((TaskRecord("arts", "ab"), TaskRecord("law", "cd")), (TaskRecord("music", "ef"),)),
    submitted=1764000000.5, ranks=4,
)  # fmt: skip
BEGIN = AttemptBegin(attempt=0, job="17_0", nodes=("node1", "node2"), ranks=4, time=100.0)
END = AttemptEnd(
    attempt=0, outcome="timeout", step=40, reason="the time limit is near", requeued=True, time=160.0, seconds=60.5
)


def test_the_registry_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_registry(tmp_path) == []
    jobs = [JOB, replace(JOB, name="tuned.1", slurm_id=None)]
    write_registry(tmp_path, jobs)
    assert read_registry(tmp_path) == jobs


def test_a_damaged_registry_is_named(tmp_path: Path) -> None:
    registry_path(tmp_path).parent.mkdir()
    for text in ("{", "{}", '{"jobs": [{"stage": "tuned"}]}'):
        registry_path(tmp_path).write_text(text)
        with pytest.raises(ArtifactError, match=r"jobs\.json"):
            read_registry(tmp_path)


def test_attempts_are_paired_with_their_ends(tmp_path: Path) -> None:
    assert read_attempts(tmp_path / "none") == []
    record_begin(tmp_path, BEGIN)
    record_end(tmp_path, END)
    record_begin(tmp_path, lost := replace(BEGIN, attempt=1))
    record_begin(tmp_path, last := replace(BEGIN, attempt=2, nodes=("node3",)))
    record_end(tmp_path, end := replace(END, attempt=2, outcome="finished", step=None, requeued=False))
    assert read_attempts(tmp_path) == [Attempt(BEGIN, END), Attempt(lost, None), Attempt(last, end)]
    write_note(tmp_path, 1, Note(30, 12.5))
    write_json(attempt_folder(tmp_path, 2) / NOTE, {"step": 7})  # as an earlier version has left it
    notes = [attempt.noted for attempt in read_attempts(tmp_path)]
    assert notes == [None, Note(30, 12.5), Note(7)]
    assert [(attempt.step, attempt.seconds) for attempt in read_attempts(tmp_path)] == [
        (40, 60.5),
        (30, 12.5),
        (None, 60.5),
    ]


def test_a_line_that_a_power_loss_has_cut_costs_no_other(tmp_path: Path) -> None:
    record_begin(tmp_path, BEGIN)
    path = tmp_path / "attempts.jsonl"
    whole = path.read_bytes()
    record_end(tmp_path, END)
    path.write_bytes(path.read_bytes()[: len(whole) + 30])
    record_begin(tmp_path, second := replace(BEGIN, attempt=1))
    assert read_attempts(tmp_path) == [Attempt(BEGIN, None), Attempt(second, None)]


def _hold(root: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with hold_folder(root):
        ready.set()
        signal.pause()


def test_a_dead_process_holds_no_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "runs/new", ready))
    holder.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(MachineError, match=f"pid {holder.pid} on {os.uname().nodename}"),
            hold_folder(tmp_path / "runs/new"),
        ):
            pass
    finally:
        holder.kill()
        holder.join()
    with hold_folder(tmp_path / "runs/new"):
        pass


def test_a_folder_is_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    try:
        assert ready.wait(60)
        ended = threading.Event()
        threading.Timer(0.5, lambda: (ended.set(), holder.kill())).start()
        with hold_folder(tmp_path, wait_seconds=60):
            assert ended.is_set()
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()} {os.uname().nodename}"
    finally:
        holder.kill()
        holder.join()
    mine = pytest.raises(MachineError, match=f"pid {os.getpid()} on")
    with hold_folder(tmp_path), mine, hold_folder(tmp_path, wait_seconds=0.1):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("megatron_specialm.base.lock.fcntl.flock", refuse)
    with pytest.raises(MachineError, match=r"\.lock: the filesystem takes no locks"), hold_folder(tmp_path):
        pass
