"""Output that nobody reads: pipes whose reader has gone, full disks, hung-up terminals and closed descriptors."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CONFIG = str(ROOT / "configs" / "pipelines" / "smoke.yaml")
SPEAK = """
import logging, sys
from pathlib import Path
from megatron_specialm.base.output import lasting_output, nobody_reads
with lasting_output(may_be_lost=sys.argv[1] == "lost"):
    logging.basicConfig(level=logging.INFO)
    sys.stdin.read(1)
    for number in range(2000):
        print("a line of news", number)
        logging.info("and of a log")
    print("no end of line, \\ud800 \\u4e2d", end="")
    Path(sys.argv[2]).write_text(f"done {nobody_reads()}")
sys.exit(7)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def _speak(tmp_path: Path, kind: str, stdout: int | None, stderr: int | None, prefix: str = "") -> subprocess.Popen:
    script = f'exec "$@" {prefix}'
    command = ["sh", "-c", script, "sh", sys.executable, "-c", SPEAK, kind, str(tmp_path / "out")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, env=ENVIRONMENT)


def _end(process: subprocess.Popen) -> int:
    assert process.stdin is not None
    process.stdin.write(b"x")
    process.stdin.close()
    return process.wait(100)


@pytest.mark.parametrize("kind", ["lost", "kept"])
def test_a_reader_that_has_gone_ends_nothing(tmp_path: Path, kind: str) -> None:
    read, write = os.pipe()
    process = _speak(tmp_path, kind, write, write)
    os.close(write)
    os.close(read)
    assert _end(process) == 7, "the exit code is the program's own"
    assert (tmp_path / "out").read_text() == "done True"


def test_a_terminal_that_hung_up_ends_nothing(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    process = _speak(tmp_path, "lost", end, end)
    os.close(end)
    os.close(terminal)
    assert _end(process) == 7 and (tmp_path / "out").read_text() == "done True"


@pytest.mark.parametrize("prefix", [">/dev/full 2>&1", ">&- 2>&-", ">&- 2>/dev/full"])
def test_a_full_disk_or_a_closed_descriptor_ends_no_run(tmp_path: Path, prefix: str) -> None:
    assert _end(_speak(tmp_path, "lost", None, None, prefix)) == 7
    assert (tmp_path / "out").read_text() == "done False"


def test_what_reaches_a_reader_is_whole_in_any_locale(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SPEAK, "lost", str(tmp_path / "out")]
    outcome = subprocess.run(
        command, input=b"x", capture_output=True, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    )
    assert outcome.returncode == 7 and outcome.stdout.count(b"\n") == 2000
    assert outcome.stdout.endswith(b"no end of line, \\ud800 \\u4e2d") and outcome.stderr.count(b"\n") == 2000


def _specialm(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    shell = ["bash", "-c", command.replace("specialm", f"{sys.executable} -m megatron_specialm")]
    return subprocess.run(shell, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)


def test_a_table_on_a_full_disk_is_an_error(folder: Path) -> None:
    """What a command prints is all that it does: that part of it is missing must not pass for success."""
    outcome = _specialm(folder, f"specialm plan {CONFIG} > /dev/full")
    assert outcome.returncode == 3 and "error: standard output: the disk is full" in outcome.stderr, outcome.stderr
    assert "Traceback" not in outcome.stderr and "Exception ignored" not in outcome.stderr
    outcome = _specialm(folder, f"specialm plan {CONFIG} | head -1; exit ${{PIPESTATUS[0]}}")
    assert outcome.returncode == 0 and outcome.stderr == "", outcome.stderr


def test_a_run_that_nobody_watches_goes_on(folder: Path) -> None:
    run = f"specialm run {CONFIG} stages.tokenizer.vocabulary_size=300 --until tokenizer"
    outcome = _specialm(folder, f"{run} > /dev/full 2>&-")
    assert outcome.returncode == 0, outcome
    assert (folder / "runs/smoke/tokenizer/generic/done.json").exists()
