"""Commands that meet in a run folder: real launchers, workers and ranks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.e2e.test_bad_input import _command
from tests.processes import free_port

HOLDER = """
import time
from pathlib import Path
from megatron_specialm.base.lock import hold_task
with hold_task(Path("runs/smoke"), "tokenizer", "generic"):
    print("held", flush=True)
    time.sleep(600)
"""


def _start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        _command("run", *arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
    )  # fmt: skip


def _ends(process: subprocess.Popen) -> tuple[int, str]:
    try:
        said, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, said + errors


def _wait_for(happens: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not happens():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def _is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_launcher_is_killed_and_the_next_one_starts_at_once(folder: Path) -> None:
    first = _start(folder, "--until", "slm", "stages.slm.steps=100000")
    _wait_for(lambda: any((folder / "runs/smoke/artifacts").glob("slm/generic/*/metrics.jsonl")), first)
    workers = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    code, said = _ends(_start(folder, "--until", "tokens"))
    assert code == 0 and "3 of 5 tasks to do" in said, said
    assert workers and all(map(_is_gone, workers))


def test_workers_go_by_the_settings_of_their_launch(folder: Path) -> None:
    run = _start(folder, "--until", "tokens", "--jobs", "1")
    _wait_for((folder / "runs/smoke/jobs/tokenizer.generic.log").exists, run)
    (folder / "runs/smoke/pipeline.yaml").write_text("name: smoke\nroot: elsewhere\n")
    code, said = _ends(run)
    assert code == 0, said


def test_text_that_changes_before_its_task_begins(folder: Path) -> None:
    run = _start(folder, "--until", "tokens", "--jobs", "1")
    _wait_for((folder / "runs/smoke/jobs/tokenizer.generic.log").exists, run)
    with (folder / "data/smoke/torch.train.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    code, said = _ends(run)
    assert code == 1 and "tokens/torch: was planned as " in said and "its files changed in between" in said, said
    assert not (folder / "runs/smoke/tokens/torch").exists() and (folder / "runs/smoke/tokens/scipy").exists()


def test_the_first_rank_holds_the_folder(folder: Path) -> None:
    port = str(free_port())
    until = ("--until", "tokenizer")
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first = _start(folder, *until, **world, RANK="0", LOCAL_RANK="0")
    try:
        lock, written = folder / "runs/smoke/.lock", folder / "runs/smoke/pipeline.yaml"
        _wait_for(lambda: lock.exists() and str(first.pid) in lock.read_text(), first)  # it now waits for the other
        code, said = _ends(_start(folder, *until, "stages.tokenizer.vocabulary_size=301"))
        assert code == 3 and f"another command (pid {first.pid} on " in said, said
        assert not written.exists()
        code, said = _ends(_start(folder, *until, **world, RANK="1", LOCAL_RANK="1"))
        assert code == 0, said
    finally:
        code, said = _ends(first)
    assert code == 0 and (folder / "runs/smoke/tokenizer/generic").exists() and written.exists(), said


def test_the_same_settings_run_beside_a_job_at_the_task(folder: Path) -> None:
    """On a machine that knows nothing of Slurm: the task itself is held."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=folder, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SPECIALM_INCARNATION": "7_0/0"},
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        code, said = _ends(_start(folder, "--until", "tokenizer"))
        assert code == 1 and "tokenizer/generic: 7_0/0 is doing this task" in said, said
    finally:
        holder.kill()
        holder.communicate()
    code, said = _ends(_start(folder, "--until", "tokenizer"))
    assert code == 0, said


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_terminal_that_is_closed(folder: Path, ignored: bool) -> None:
    how = signal.SIG_IGN if ignored else signal.SIG_DFL
    run = subprocess.Popen(
        _command("run", "--until", "tokens"), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=lambda: signal.signal(signal.SIGHUP, how),
    )  # fmt: skip
    _wait_for((folder / "runs/smoke/jobs/tokenizer.generic.log").exists, run)
    run.send_signal(signal.SIGHUP)
    code, said = _ends(run)
    assert (code, "run the same command again" in said) == ((0, False) if ignored else (130, True)), said
