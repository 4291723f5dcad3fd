"""Sockets and meeting points, wherever TMPDIR points."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_specialm.base import temporary
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.temporary import short_place
from tests.conftest import ROOT

# What `specialm run` does to have workers: a server that forks them, reached by a socket.
WORKER = """
import multiprocessing.util
from megatron_specialm.run.processes import worker_context
context = worker_context(["json"], threads=1)
process = context.Process(target=len, args=("",))
process.start()
process.join()
print(process.exitcode, multiprocessing.util.get_temp_dir())
"""


@pytest.mark.parametrize("name", ["scratch-of-job-" + "0" * 80, "a #1? %20", "missing/folder", "plain"])
def test_workers_start_wherever_tmpdir_points(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    if not name.startswith("missing"):
        folder.mkdir()
    outcome = subprocess.run(
        [sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    code, place = outcome.stdout.split()
    assert code == "0" and not Path(place).exists(), "it is removed at the end"


def test_a_place_without_room_for_a_sockets_name_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, short = tmp_path / ("x" * 100), Path(tempfile.mkdtemp(dir="/tmp"))
    long.mkdir()
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        monkeypatch.setattr(temporary, "SHORT_PLACES", (str(tmp_path / "none"), str(short)))
        assert short_place() == str(short) and not list(short.iterdir())
        monkeypatch.setattr(temporary, "SHORT_PLACES", (str(tmp_path / "none"),))
        with pytest.raises(MachineError, match=r"x{100}, .*none: in none of these .* set TMPDIR"):
            short_place()
    finally:
        short.rmdir()
