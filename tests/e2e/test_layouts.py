"""Layouts through the command line: a certificate, a training that carries it, and one that goes on in another layout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import cli
from tests.conftest import ROOT

CONFIG = ROOT / "configs" / "pipelines" / "smoke.yaml"
TENSOR = ("stages.slm.parallel.tensor_parallel=2", "stages.slm.parallel.sequence_parallel=true")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    subprocess.run([sys.executable, str(ROOT / "tools" / "smoke_corpus.py")], cwd=folder, check=True)
    return folder


def _state(folder: Path, step: int) -> dict:
    return json.loads((folder / f"runs/smoke/slm/generic/step_{step:07d}/state.json").read_text())


def test_a_certificate_goes_into_checkpoints_that_another_layout_takes_up(folder: Path) -> None:
    proof = cli(folder, "parity", str(CONFIG), *TENSOR, "--stage", "slm", "--pipeline-parallel", "1")
    assert proof.returncode == 0 and "equals one process" in proof.stdout, proof.stdout + proof.stderr
    certificate = json.loads((folder / "runs/smoke/parity/slm.json").read_text())
    assert certificate["passed"] and certificate["layout"]["tensor_parallel"] == 2 and certificate["packing"] == "none"

    first = cli(folder, "run", str(CONFIG), *TENSOR, "--until", "slm")
    assert first.returncode == 0, first.stdout + first.stderr
    last = _state(folder, 160)
    assert last["parity"] == certificate and last["layout"]["sequence_parallel"] is True
    log = (folder / "runs/smoke/jobs/slm.generic.log").read_text()
    assert "kernels: " in log

    # A layout is no part of what a stage is: the finished one stays done, and another goes on from its checkpoints.
    plan = cli(folder, "plan", str(CONFIG), "--tasks", "stages.slm.parallel.pipeline_parallel=2")
    assert [line for line in plan.stdout.splitlines() if "slm/generic" in line and "done" in line], plan.stdout


def test_a_layout_that_differs_is_found_out(folder: Path) -> None:
    refused = cli(folder, "parity", str(CONFIG), "--stage", "slm", "--tensor-parallel", "3")
    assert refused.returncode == 2 and "must divide the model's attention_heads" in refused.stderr
    assert "the nearest parallel.tensor_parallel that does is" in refused.stderr
    none = cli(folder, "parity", str(CONFIG), "--tensor-parallel", "3")
    assert none.returncode == 2 and none.stdout.count(": not run: stages.") == 7
    missing = cli(folder, "parity", str(CONFIG), "--stage", "nothing")
    assert missing.returncode == 2 and "no train stage of that name; there are slm" in missing.stderr


def test_check_says_what_would_not_fit(folder: Path) -> None:
    large = ("stages.slm.model=llm-771m", "stages.slm.global_batch_size=4096", "stages.slm.micro_batch_size=4096")
    refused = cli(folder, "check", str(CONFIG), *large, "--gpu", "H100")
    assert refused.returncode == 3
    assert "a process needs" in refused.stderr and "set micro_batch_size: " in refused.stderr
    fits = cli(folder, "check", str(CONFIG), "--gpu", "H100")
    assert fits.returncode == 0 and "GPU hours at 40% MFU" in " ".join(fits.stdout.split()), fits.stdout
    fp8 = cli(folder, "run", str(CONFIG), "stages.slm.precision=fp8")
    assert fp8.returncode == 3 and "needs a GPU of compute capability 8.9" in fp8.stderr
    assert cli(folder, "tune-precision", str(CONFIG)).returncode == 3


def test_capabilities_are_printed(folder: Path) -> None:
    shown = cli(folder, "check", "--capabilities")
    assert shown.returncode == 0
    for words in ("tensor parallel", "context parallel", "GPU with Transformer Engine", "fp8"):
        assert words in " ".join(shown.stdout.split())
