"""Fencing: a training on a node that is cut off but alive continues after its job's second attempt, and changes nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_specialm.base.artifacts import MARKER, artifact_link, is_complete
from megatron_specialm.base.files import read_json
from megatron_specialm.base.protocol import FENCING_TOKEN
from megatron_specialm.checkpoint.opening import newest_checkpoint
from tests.conftest import ROOT

PROGRAM = """
import sys
from pathlib import Path
from megatron_specialm.base.artifacts import Cost, MARKER, Marker, begin_artifact, finish_artifact, artifact_link
from megatron_specialm.base.environment import ALONE
from tests.training import run_training, stage
root, steps = Path(sys.argv[1]), int(sys.argv[2])
folder = begin_artifact(root, "slm", "generic", digest="d")
run_training(folder, ALONE, stage(steps=steps, checkpoint={"every": 20}))
finish_artifact(root, "slm", "generic", Marker("d", Cost(0, 0, 1.0, 1.0, "cpu", 1), {}, {}))
"""


def _attempt(root: Path, number: int, *, steps: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root), str(steps)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), FENCING_TOKEN: f"123_0/{number}"},
    )  # fmt: skip


def _freeze_outside_of_a_save(process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        if any(folder.glob("step_*")) and not any(folder.glob(".step_*.tmp")):
            return
        process.send_signal(signal.SIGCONT)


def test_an_attempt_that_was_taken_over_publishes_nothing(tmp_path: Path) -> None:
    folder = artifact_link(tmp_path, "slm", "generic")
    cut_off = _attempt(tmp_path, 0, steps=100_000)
    try:
        _freeze_outside_of_a_save(cut_off, folder)
        newest, _ = newest_checkpoint(folder)
        assert newest is not None
        end = int(newest.name.removeprefix("step_")) + 10
        _, errors = (second := _attempt(tmp_path, 1, steps=end)).communicate(timeout=100)
        assert second.returncode == 0, errors
        cut_off.send_signal(signal.SIGCONT)
        _, errors = cut_off.communicate(timeout=100)
    finally:
        cut_off.kill()
        cut_off.wait()
    assert cut_off.returncode == 1
    assert "ArtifactError" in errors and "another attempt at this task, 123_0/1, has taken over from 123_0/0" in errors
    assert is_complete(tmp_path, "slm", "generic", digest="d") and read_json(folder / "result.json")["step"] == end
    newest, passed_over = newest_checkpoint(folder)
    assert newest == folder / f"step_{end:07d}" and not passed_over
    assert not any(folder.glob(".step_*.tmp"))


def test_an_attempt_that_has_trained_to_its_end_cannot_write_the_marker(tmp_path: Path) -> None:
    program = PROGRAM.replace("finish_artifact(root", "input()\nfinish_artifact(root")
    first = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), "2"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 100
        while not (artifact_link(tmp_path, "slm", "generic") / "result.json").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.01)
        taking_over = [sys.executable, "-c", PROGRAM.replace("run_training(folder", "sys.exit(0); (folder")]
        subprocess.run(
            [*taking_over, str(tmp_path), "2"], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=100, check=False
        )
        _, errors = first.communicate("\n", timeout=100)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 1 and f"has taken over from {first.pid}@" in errors
    assert not (artifact_link(tmp_path, "slm", "generic") / MARKER).exists()
