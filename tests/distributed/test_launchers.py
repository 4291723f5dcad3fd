"""A pipeline started by torchrun, and by mpirun where Open MPI and mpi4py are installed: real ranks, a real rendezvous."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from tests.conftest import ROOT
from tests.texts import SMOKE_SETS, write_sets
from tests.training import EPSILON

CONFIG = str(ROOT / "configs" / "pipelines" / "smoke.yaml")
OVERRIDES = [
    "stages.tokenizer.vocabulary_size=300", "stages.slm.steps=10", "stages.slm.schedule.warmup_steps=2",
    "stages.slm.global_batch_size=16", "defaults.train.micro_batch_size=4",
    f"stages.slm.optimizer.epsilon={EPSILON}", "--until", "slm",
]  # fmt: skip
RUN = ["-m", "megatron_specialm", "run", CONFIG, *OVERRIDES]


def _start(folder: Path, command: list[str], **environment: str) -> None:
    outcome = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(find_final(folder / "runs/smoke/slm/generic")).weights


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    write_sets(folder / "data" / "smoke", *SMOKE_SETS, words=200)  # as the fixture `folder` has it
    _start(folder, [sys.executable, *RUN])
    return _weights(folder)


def _agree(folder: Path, alone: dict[str, torch.Tensor]) -> None:
    """Two ranks make what one process makes, and one process finds it done: where it ran is no part of the digest."""
    again = subprocess.run(
        [sys.executable, *RUN], cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "0 of 3 tasks to do" in again.stdout, again.stdout + again.stderr
    together = _weights(folder)
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_torchrun(folder: Path, alone: dict[str, torch.Tensor]) -> None:
    _start(folder, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *RUN])
    _agree(folder, alone)


@pytest.mark.slow
def test_mpirun(folder: Path, alone: dict[str, torch.Tensor]) -> None:
    pytest.importorskip("mpi4py", reason="the extra `mpi` is not installed")
    if shutil.which("mpirun") is None:
        pytest.skip("Open MPI is not installed")
    _start(
        folder, ["mpirun", "--oversubscribe", "-n", "2", sys.executable, *RUN],
        OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    )  # fmt: skip
    _agree(folder, alone)


def test_a_port_in_use_is_said(folder: Path) -> None:
    import socket

    _start(folder, [sys.executable, *RUN[:-1], "tokens"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = subprocess.run(
            [sys.executable, *RUN], cwd=folder, capture_output=True, text=True, timeout=200,
            env={
                **os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]),
            },
        )  # fmt: skip
    assert outcome.returncode == 3 and "Traceback" not in outcome.stderr, outcome.stderr
    assert "port is in use" in outcome.stderr


def test_a_batch_that_the_ranks_do_not_divide(folder: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", *RUN], cwd=folder,
        capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert outcome.returncode != 0
    assert "must be a multiple of micro_batch_size 4 x data_parallel 3 = 12" in " ".join(outcome.stderr.split())
