"""The built wheel in an environment of its own: it does what a checkout does, from a folder with nothing but text."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_specialm.config.load import find_config
from tests.conftest import ROOT
from tests.e2e.test_readme import make_own_text
from tests.unit.test_terminal import LONG, long_config

# A shipped config, made small by overrides; the name is that of the repository, and nothing is there in the working directory.
CONFIG = "configs/pipelines/your-domain.yaml"
SMALL = [
    "text.generic.train=my-text/generic/*.jsonl", "stages.tokenizer.vocabulary_size=300", "stages.tokens.context_length=32",
    "stages.vectors.encoder.dimensions=4", "stages.clusters.k=2", "defaults.train.model=nano", "defaults.train.precision=fp32",
    "defaults.train.global_batch_size=8", "defaults.train.micro_batch_size=4", "stages.slm-is.steps=4",
    "stages.slm-is.schedule.warmup_steps=2", "stages.tuned.steps=4", "stages.tuned.global_batch_size=8",
    "stages.tuned.schedule.warmup_steps=2", "stages.tuned.early_stopping.evaluate_every=2",
]  # fmt: skip


def _run(folder: Path, *command: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    outcome = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; what the wheel requires is taken from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("megatron_specialm", "configs", "slurm"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    pip, quietly = [sys.executable, "-m", "pip"], ["-q", "--no-deps", "--no-index"]
    _run(folder, *pip, "wheel", *quietly, "--no-build-isolation", "-w", "out", folder / "tree")
    (wheel,) = (folder / "out").glob("*.whl")
    environment = folder / "environment"
    _run(folder, sys.executable, "-m", "venv", "--without-pip", environment)
    _run(folder, *pip, "--python", environment / "bin" / "python", "install", *quietly, wheel)
    # Not as a site directory: an editable installation of this repository in it stays out of sight.
    (_library(environment).parent / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def _library(environment: Path) -> Path:
    """The installed package."""
    (library,) = environment.glob("lib/python*/site-packages/megatron_specialm")
    return library


@pytest.fixture
def specialm(environment: Path, tmp_path: Path) -> Callable[..., str]:
    """What the installed command prints in an empty folder."""
    return lambda *arguments: _run(tmp_path, environment / "bin" / "specialm", *arguments)


def test_a_wheel_has_what_stands_beside_the_package_in_a_checkout(environment: Path) -> None:
    for folder in ("configs", "slurm"):
        shipped = _library(environment) / "shipped" / folder
        there = {path.relative_to(shipped): path.read_bytes() for path in shipped.rglob("*") if path.is_file()}
        assert there == {
            path.relative_to(ROOT / folder): path.read_bytes() for path in (ROOT / folder).rglob("*") if path.is_file()
        }


def test_an_installed_wheel_checks_plans_and_submits(specialm: Callable[..., str], tmp_path: Path) -> None:
    """A preset by name, the site profile and the job's template come with it; a profile of one's own needs no template."""
    long_config(tmp_path)
    assert "OK" in specialm("check", "long.yaml")
    assert LONG in specialm("plan", "long.yaml")
    submit = ("submit", "long.yaml", "--dry-run")
    assert "#SBATCH --gpus-per-node=1\n" in specialm(*submit)  # as the shipped profile has it
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "site.yaml").write_text("jobs: {default: {partition: mine}}\n")
    script = specialm(*submit, "--site", "elsewhere/site.yaml")
    assert "#SBATCH --partition=mine\n" in script and f"cd {tmp_path}\n" in script
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.yaml").write_text("jobs: {default: {partition: here}}\n")
    assert "#SBATCH --partition=here\n" in specialm(*submit)


@pytest.mark.slow
def test_it_runs_a_shipped_config_from_an_empty_folder(
    specialm: Callable[..., str], environment: Path, tmp_path: Path
) -> None:
    make_own_text(tmp_path)
    where = _run(tmp_path, environment / "bin" / "python", "-c", "import megatron_specialm as m; print(m.__file__)")
    assert where.strip() == str(_library(environment) / "__init__.py")
    assert "OK" in specialm("check", CONFIG, *SMALL)
    assert f"exec {environment}/bin/python -m megatron_specialm" in specialm("submit", CONFIG, "--dry-run", *SMALL)
    assert "perplexity" in specialm("run", CONFIG, *SMALL)
    assert "0 of " in specialm("run", CONFIG, *SMALL)
    exported = "runs/your-domain/export/tuned.support-tickets"
    assert specialm("generate", exported, "bran", "--tokens", "4").startswith("bran")


def test_a_file_in_the_working_directory_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = Path(CONFIG)
    assert find_config(own) == ROOT / CONFIG
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config(own) == own
    for other in ("missing.yaml", "configs/../README.md", "README.md"):
        assert find_config(Path(other)) == Path(other)
