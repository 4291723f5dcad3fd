"""Fixtures shared by all tests, and how pytest-xdist distributes the tests: `pytest -n WORKERS`."""

import fcntl
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_specialm.config.model import ModelConfig
from tests.texts import SMOKE_SETS, write_sets

ROOT = Path(__file__).parents[1]
OWN_CLUSTER = ("tests/cluster/test_interruptions.py", "tests/cluster/test_pipeline.py")

if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch: workers share the machine's cores
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """The tests of a file run on one worker. Those of tests/cluster mostly wait: the two longest files have a worker and a
    cluster of their own, the others share one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/cluster" if file.startswith("tests/cluster/") and file not in OWN_CLUSTER else file

    config.option.loadscopereorder = False  # as collected: the folders with the longest tests come first
    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Exempt what the imports have made from garbage collection: each training collects, in a quarter of a second otherwise."""
    gc.collect()
    gc.freeze()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first worker to ask for it fills with `make`, while others wait. Tests only read it."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / f"{name}.made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker whose `make` failed
            folder.mkdir()
            make(folder)
            (shared / f"{name}.made").touch()
    return folder


@pytest.fixture
def neox() -> ModelConfig:
    """A GPT-NeoX-style shape small enough for any test."""
    return ModelConfig(layers=2, hidden_size=32, ffn_hidden_size=64, attention_heads=4)


@pytest.fixture
def llama() -> ModelConfig:
    """A Llama-style shape with grouped queries."""
    return ModelConfig(family="llama", layers=2, hidden_size=32, ffn_hidden_size=48, attention_heads=4, query_groups=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a little text for the smoke config."""
    write_sets(tmp_path / "data" / "smoke", *SMOKE_SETS, words=200)
    return tmp_path


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which the smoke pipeline has run to its end, on this machine. What it printed is in `stdout`.

    Tests only read it; those that write take a copy, `smoke_copy`.
    """
    return made_once(tmp_path_factory, "smoke", _run_smoke)


@pytest.fixture(scope="module")
def smoke_copy(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `smoke_run` for the tests of one file."""
    return copied(smoke_run, tmp_path_factory.mktemp("smoke-copy"))


def copied(source: Path, folder: Path) -> Path:
    """`folder`, with all that is in `source`: same times, and what is linked there is linked here."""
    subprocess.run(["cp", "--archive", "--reflink=auto", f"{source}/.", folder], check=True)
    return folder


def _run_smoke(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    subprocess.run([sys.executable, ROOT / "tools" / "smoke_corpus.py"], cwd=folder, check=True, env=environment)
    config = str(ROOT / "configs" / "pipelines" / "smoke.yaml")
    command = [sys.executable, "-m", "megatron_specialm", "run", config]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    from megatron_specialm.base.environment import ALONE
    from megatron_specialm.engine.process_groups import process_group

    with process_group(ALONE):
        yield


@pytest.fixture(scope="session")
def megatron_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that megatron-core has written at TP2 x PP2 (`tests/peers/megatron.py`). Tests only read them."""
    return made_once(tmp_path_factory, "megatron", lambda folder: run_peer("megatron", "save", folder))


@pytest.fixture(scope="session")
def megatron_adam_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints with the state of Megatron-Core's optimizers (`tests/peers/megatron_adam.py`). Tests only read them."""
    return made_once(tmp_path_factory, "megatron-adam", lambda folder: run_peer("megatron_adam", "save", folder))


@pytest.fixture(scope="session")
def deepspeed_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that DeepSpeed has written on two processes (`tests/peers/deepspeed.py`). Tests only read them."""
    return made_once(tmp_path_factory, "deepspeed", lambda folder: run_peer("deepspeed", "save", folder))


def run_peer(program: str, *arguments: Any) -> None:
    """Run a program of tests/peers to its end. Its answer is in files: what it prints is mixed with the output of its libraries
    and of its ranks."""
    command = [sys.executable, "-m", f"tests.peers.{program}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
