"""Workers of a launcher that is killed: they, and what they have started, are gone at once, and let go of the folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.lock import hold_folder
from tests.conftest import ROOT

PROGRAM = """
import multiprocessing, os, sys, time
from pathlib import Path
from megatron_specialm.base.lock import hold_folder
from megatron_specialm.base.orphans import end_with

def work(alive, held, said):
    end_with(alive)
    if os.fork() == 0:
        time.sleep(600)
    said.send(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    theirs, alive = context.Pipe(duplex=False)
    heard, said = context.Pipe(duplex=False)
    with hold_folder(Path(sys.argv[2])) as held:
        context.Process(target=work, args=(theirs, held, said)).start()
        theirs.close()
        print(heard.recv(), flush=True)
        time.sleep(600)
"""


def _alive(group: int) -> list[str]:
    """The processes of a group that are not yet gone; who has been killed and not been waited for is."""
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
    (tmp_path / "launcher.py").write_text(PROGRAM)
    root = tmp_path / "run"
    launcher = subprocess.Popen(
        [sys.executable, str(tmp_path / "launcher.py"), method, str(root)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert launcher.stdout is not None
        worker = int(launcher.stdout.readline())
        assert len(_alive(worker)) == 2
        with pytest.raises(MachineError, match=rf"pid {launcher.pid} on .*, or a worker"), hold_folder(root):
            pass
        if stopped:
            os.kill(worker, signal.SIGSTOP)
    finally:
        launcher.kill()
        launcher.communicate()
    with hold_folder(root, wait_seconds=60):
        _wait_until_gone(worker)


def test_a_worker_that_is_slow_to_start_ends_as_well(tmp_path: Path) -> None:
    """Its launcher was gone before it could watch."""
    program = PROGRAM.replace(
        "    end_with(alive)\n", "    said.send(os.getpid()); time.sleep(1)\n    end_with(alive)\n"
    )
    (tmp_path / "launcher.py").write_text(program)
    launcher = subprocess.Popen(
        [sys.executable, str(tmp_path / "launcher.py"), "forkserver", str(tmp_path / "run")], stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert launcher.stdout is not None
    worker = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.communicate()
    deadline = time.monotonic() + 60
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
