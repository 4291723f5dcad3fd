"""An installed wheel does what a checkout does, from a folder with nothing but a config and its text."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_terminal import LONG, long_config

ROOT = Path(__file__).parents[2]


def _run(folder: Path, *command: str | Path, library: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(library), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    outcome = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("megatron_specialm", "configs", "slurm"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "tree" / name)
    library = folder / "library"
    quietly = ("-q", "--no-deps", "--no-index")
    _run(
        folder, "pip", "wheel", *quietly, "--no-build-isolation", "-w", folder / "out", folder / "tree", library=library
    )
    (wheel,) = (folder / "out").glob("*.whl")
    _run(folder, "pip", "install", *quietly, "--target", library, wheel, library=library)
    return library


def test_a_wheel_has_what_stands_beside_the_package_in_a_checkout(library: Path) -> None:
    for folder in ("configs", "slurm"):
        shipped = library / "megatron_specialm" / "shipped" / folder
        there = {path.relative_to(shipped): path.read_bytes() for path in shipped.rglob("*") if path.is_file()}
        assert there == {
            path.relative_to(ROOT / folder): path.read_bytes() for path in (ROOT / folder).rglob("*") if path.is_file()
        }


def test_an_installed_wheel_checks_plans_and_submits(library: Path, tmp_path: Path) -> None:
    """A preset by name, the site profile and the job's template come with it; a profile of one's own needs no template."""
    long_config(tmp_path)
    assert "OK" in _run(tmp_path, "megatron_specialm", "check", "long.yaml", library=library)
    assert LONG in _run(tmp_path, "megatron_specialm", "plan", "long.yaml", library=library)
    submit = ("megatron_specialm", "submit", "long.yaml", "--dry-run")
    assert "#SBATCH --gpus-per-node=1\n" in _run(tmp_path, *submit, library=library)  # as the shipped profile has it
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "site.yaml").write_text("jobs: {default: {partition: mine}}\n")
    script = _run(tmp_path, *submit, "--site", "elsewhere/site.yaml", library=library)
    assert "#SBATCH --partition=mine\n" in script and f"cd {tmp_path}\n" in script
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.yaml").write_text("jobs: {default: {partition: here}}\n")
    assert "#SBATCH --partition=here\n" in _run(tmp_path, *submit, library=library)
