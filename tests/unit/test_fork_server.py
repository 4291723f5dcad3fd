"""The server that workers are forked from does not outlive its launcher."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LAUNCHER = """
import time
from multiprocessing import forkserver
from megatron_specialm.run.processes import worker_context
worker_context(["slow"], threads=1)
forkserver.ensure_running()
time.sleep(600)
"""
SLOW = """
import os, pathlib, time
pathlib.Path("importing").write_text(str(os.getpid()))
time.sleep(600)
"""


def test_killed_while_its_server_imports(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=tmp_path, env=environment)
    number = tmp_path / "importing"
    while not (number.exists() and number.read_text()):
        assert launcher.poll() is None
        time.sleep(0.05)
    server = psutil.Process(int(number.read_text()))
    launcher.kill()
    launcher.wait()
    server.wait(timeout=60)  # of the 600 seconds that it would import
