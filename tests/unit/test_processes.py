"""Worker processes: they say why they failed, end together, and do not outlive their launcher."""

import gc
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver, reduction
from pathlib import Path

import psutil
import pytest

from megatron_specialm.base.errors import DataError, MachineError
from megatron_specialm.base.lock import hold_folder
from megatron_specialm.base.process_status import handling
from megatron_specialm.run.processes import Workers, end_workers, worker_context
from tests.conftest import ROOT

PROGRAM = """
import contextlib, multiprocessing, os, sys, time
from pathlib import Path
from megatron_specialm.base.lock import hold_folder
from megatron_specialm.run.processes import Workers

FOLDER = Path(sys.argv[-1])

class Slow:
    def __reduce__(self):
        return load_slowly, ()

def load_slowly():
    (FOLDER / "pid").write_text(str(os.getpid()))
    time.sleep(1)

def work(held, *_):
    if os.fork() > 0:
        (FOLDER / "pid").write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    method, slow = sys.argv[1:3]
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["megatron_specialm.run.fork_server", *["slow_module"] * (slow == "server")])
    with hold_folder(FOLDER / "run") as held, contextlib.suppress(KeyboardInterrupt):
        arguments = (held, Slow()) if slow == "worker" else (held,)
        workers = Workers(context, work, [arguments], logs=[FOLDER / "log"], name="worker")
        time.sleep(600)
    os._exit(0)  # without waiting for the worker
"""


SLOW_MODULE = """
import os, time
from pathlib import Path
Path(__file__).with_name("pid").write_text(str(os.getpid()))
time.sleep(2)
"""


def _launch(folder: Path, method: str, *, slow: str = "none") -> tuple[subprocess.Popen, int]:
    """A launcher, which leads a session, and the id of its worker; or where the fork server is slow, of that."""
    (folder / "launcher.py").write_text(PROGRAM)
    (folder / "slow_module.py").write_text(SLOW_MODULE)
    launcher = subprocess.Popen(
        [sys.executable, str(folder / "launcher.py"), method, slow, str(folder)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not ((folder / "pid").exists() and (folder / "pid").read_text()):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return launcher, int((folder / "pid").read_text())


def _alive(group: int) -> list[str]:
    """The processes of a group that have not ended; a killed one that nobody has waited for has."""
    said = subprocess.run(["ps", "-e", "-o", "pgid=,stat=,pid="], capture_output=True, text=True, check=True).stdout
    found = [line.split() for line in said.splitlines()]
    return [pid for pgid, state, pid in found if pgid == str(group) and not state.startswith("Z")]


def _wait_until_gone(group: int) -> None:
    deadline = time.monotonic() + 60
    while _alive(group):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("stopped", [False, True], ids=["at work", "stopped"])
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_no_worker_outlives_its_launcher(tmp_path: Path, method: str, stopped: bool) -> None:
    launcher, worker = _launch(tmp_path, method)
    try:
        assert len(_alive(worker)) == 2, "with the process that it has started"
        with (
            pytest.raises(MachineError, match=rf"pid {launcher.pid} on .*, or a worker"),
            hold_folder(tmp_path / "run"),
        ):
            pass
        if stopped:
            os.kill(worker, signal.SIGSTOP)
    finally:
        launcher.kill()
        launcher.wait()
    with hold_folder(tmp_path / "run", wait_seconds=60):
        _wait_until_gone(worker)


def test_a_worker_that_is_slow_to_start_ends_as_well(tmp_path: Path) -> None:
    """Its launcher has ended before it watches the pipe."""
    launcher, pid = _launch(tmp_path, "forkserver", slow="worker")
    worker = psutil.Process(pid)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("method", "slow"), [("forkserver", "server"), ("forkserver", "worker"), ("spawn", "worker")])
def test_ctrl_c_during_the_start_prints_nothing(tmp_path: Path, method: str, slow: str) -> None:
    """A terminal sends it to all processes of the launcher's group."""
    launcher, starting = _launch(tmp_path, method, slow=slow)
    os.killpg(launcher.pid, signal.SIGINT)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 0 and not errors
    _wait_until_gone(starting)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_to_all_leave_the_fork_server(tmp_path: Path, number: signal.Signals) -> None:
    """A launcher that hears of a stop waits for its workers, which a server tells of their ends."""
    launcher, worker = _launch(tmp_path, "forkserver")
    server = psutil.Process(worker).parent()
    assert server is not None and os.getpgid(server.pid) == server.pid != launcher.pid
    if number is not signal.SIGHUP:  # which a terminal sends to its session only
        server.send_signal(number)
    time.sleep(0.5)
    assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    launcher.kill()
    launcher.communicate()


def _work(rank: int, failing: str) -> None:
    if rank == 0:
        time.sleep(600)
    print("from rank", rank)
    if failing == "error":
        raise DataError("corpus.jsonl: is empty")
    if failing == "bug":
        raise AssertionError("this must not be")
    if failing == "signal":
        os.kill(os.getpid(), signal.SIGKILL)


def _wait(workers: Workers) -> None:
    deadline = time.monotonic() + 60
    while not workers.have_ended():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("error", "corpus.jsonl: is empty"),
        ("bug", "ended with exit code 1: AssertionError: this must not be"),
        ("signal", "ended with signal SIGKILL: from rank 1"),
    ],
)
def test_when_one_fails_the_others_are_ended_and_it_is_named(tmp_path: Path, failing: str, reason: str) -> None:
    context = worker_context([], threads=1)
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    workers = Workers(context, _work, [(0, failing), (1, failing)], logs=logs, name="worker")
    _wait(workers)
    assert workers.failure() == (1, reason)
    assert "from rank 1" in logs[1].read_text()


def test_workers_that_end_well_have_no_failure(tmp_path: Path) -> None:
    context = worker_context([], threads=1)
    workers = Workers(context, _work, [(1, "no"), (2, "no")], logs=[tmp_path / "log"] * 2, name="worker")
    _wait(workers)
    assert workers.failure() is None
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["from rank 1", "from rank 2"]


def test_a_launcher_that_is_interrupted_while_it_asks_for_a_worker_asks_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half a request would end the fork server, with a traceback."""

    def interrupted(*arguments: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        send(*arguments)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    send = reduction.sendfds
    context = worker_context([], threads=1)
    with handling(end, signal.SIGTERM), monkeypatch.context() as patch:
        patch.setattr(reduction, "sendfds", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Workers(context, _work, [(1, "no")], logs=[tmp_path / "log"], name="worker")
    server = forkserver._forkserver._forkserver_pid
    workers = Workers(context, _work, [(1, "no")], logs=[tmp_path / "log"], name="worker")
    _wait(workers)
    assert workers.failure() is None
    assert server == forkserver._forkserver._forkserver_pid  # another would have been started
    assert "Traceback" not in capfd.readouterr().err


def _count_exempted() -> None:
    print(gc.get_freeze_count())


def test_what_the_server_has_imported_is_exempt_from_garbage_collection(tmp_path: Path) -> None:
    """A collection would touch, and so copy, every page that a worker shares with the server."""
    workers = Workers(worker_context([], threads=1), _count_exempted, [()], logs=[tmp_path / "log"], name="worker")
    _wait(workers)
    assert int((tmp_path / "log").read_text()) > 1000


def test_workers_that_do_not_end_when_asked_are_killed(tmp_path: Path) -> None:
    context = worker_context([], threads=1)
    workers = Workers(context, _work, [(0, "no")], logs=[tmp_path / "log"], name="worker")
    end_workers([workers])
    assert workers.have_ended() and "signal SIGTERM" in str(workers.failure())
