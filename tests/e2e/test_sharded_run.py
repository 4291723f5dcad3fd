"""A config with its generic set in shards, through the command line: what is trained is what is trained without them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_specialm.base.files import read_json
from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from tests.commands import succeed
from tests.conftest import ROOT

CONFIG = str(ROOT / "configs" / "pipelines" / "smoke.yaml")
OVERRIDES = [
    "stages.tokenizer.vocabulary_size=300", "stages.slm-is.steps=10", "stages.slm-is.schedule.warmup_steps=2",
    "stages.vectors.encoder.dimensions=64", "stages.slm-is.global_batch_size=16", "defaults.train.micro_batch_size=4",
]  # fmt: skip
RUN = ["run", CONFIG, *OVERRIDES]
MPIRUN = [
    "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "megatron_specialm",
]  # fmt: skip


@pytest.fixture
def files(folder: Path) -> Path:
    """The generic set in four files, and validation text of its own, so that no shard holds out documents."""
    data = folder / "data" / "smoke"
    lines = (data / "generic.train.jsonl").read_text().splitlines(keepends=True)
    for number in range(4):
        (data / f"part.{number}.jsonl").write_text("".join(lines[number * 10 : (number + 1) * 10]))
    return folder


def _generic(shards: int) -> list[str]:
    files = {"train": "data/smoke/part.*.jsonl", "validation": "data/smoke/generic.test.jsonl"}
    return [
        f"text.generic={json.dumps({**files, 'test': 'data/smoke/generic.test.jsonl', 'shards': shards})}",
        f"root=runs/{shards}",
    ]


def _mpirun(folder: Path, arguments: list[str], *, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MPIRUN, *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_the_same_weights_in_shards_and_not(files: Path) -> None:
    for shards in (1, 3):
        succeed(files, *RUN, *_generic(shards), "--until", "slm-is")
    whole, sharded = (read_checkpoint(find_final(files / f"runs/{shards}/slm-is/torch")).weights for shards in (1, 3))
    assert whole.keys() == sharded.keys()
    for name in whole:
        assert torch.equal(whole[name], sharded[name]), name
    again = succeed(files, *RUN, *_generic(3), "--until", "slm-is")
    assert "0 of" in again, again


needs_mpi = pytest.mark.skipif(
    shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None, reason="Open MPI or mpi4py is missing"
)


@needs_mpi
def test_clusters_under_mpi_are_those_of_one_process(files: Path) -> None:
    run = [*RUN, *_generic(3), "stages.slm.micro_batch_size=1", "--until", "assignment"]
    outcome = _mpirun(files, run, timeout=250)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    cost = read_json(files / "runs/3/clusters/generic/done.json")["cost"]
    assert cost["processes"] == 2 and cost["device_seconds"] == pytest.approx(2 * cost["wall_seconds"])
    assert read_json(files / "runs/3/assignment/generic/done.json")["cost"]["processes"] == 1
    together = np.load(files / "runs/3/clusters/generic/centroids.npy")
    shutil.rmtree(files / "runs/3")
    succeed(files, *run)
    np.testing.assert_array_equal(together, np.load(files / "runs/3/clusters/generic/centroids.npy"))


@needs_mpi
def test_an_error_on_one_mpi_rank_ends_all(files: Path) -> None:
    """The others wait for what the first one was to make."""
    run = [*RUN, *_generic(3), "stages.vectors.encoder.dimensions=16", "--until", "vectors"]
    outcome = _mpirun(files, run, timeout=100)
    assert outcome.returncode == 2, outcome.stderr
    assert "error: encoder.dimensions 16: static vectors have 64, 128 or 256" in outcome.stderr
