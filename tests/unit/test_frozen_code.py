"""The code of a submission: copied once, and run by its jobs whatever becomes of the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_specialm.config.site import Site
from megatron_specialm.slurm.sbatch import render
from megatron_specialm.slurm.submission import PACKAGE, freeze_code, this_code

TEMPLATE = Path(__file__).parents[2] / "slurm" / "stage.sbatch.template"


def test_the_code_is_known_by_its_content_and_copied_whole_once(tmp_path: Path) -> None:
    code = this_code(tmp_path)
    assert code == this_code(tmp_path) and code.folder.name == f"code-{code.sha256[:12]}"
    freeze_code(code)
    copy = code.folder / PACKAGE.name
    assert (copy / "slurm" / "submission.py").read_bytes() == (PACKAGE / "slurm" / "submission.py").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [code.folder.name]
    (copy / "__main__.py").write_text("kept")
    freeze_code(code)
    assert (copy / "__main__.py").read_text() == "kept", "jobs run from it"


def test_a_copy_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    code = this_code(tmp_path)
    rest = tmp_path / f".{code.folder.name}.{os.getpid()}.tmp"
    (rest / PACKAGE.name).mkdir(parents=True)
    (rest / PACKAGE.name / "old.py").touch()
    freeze_code(code)
    assert (
        not (code.folder / PACKAGE.name / "old.py").exists() and (code.folder / PACKAGE.name / "__main__.py").exists()
    )


def test_a_job_runs_the_frozen_code_though_it_stands_in_a_checkout_that_was_edited(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(PACKAGE, checkout / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / PACKAGE.name / "__pycache__").mkdir()
    (checkout / PACKAGE.name / "__pycache__" / "old.pyc").touch()
    freeze = "from pathlib import Path; from megatron_specialm.slurm.submission import *; "
    freeze += "code = this_code(Path.cwd().parent / 'jobs'); freeze_code(code); print(code.folder, end='')"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    frozen = subprocess.run(
        [sys.executable, "-c", freeze],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not list(Path(frozen.stdout).rglob("old.pyc"))
    (checkout / PACKAGE.name / "__init__.py").write_text("raise SystemExit('edited')\n")
    script = render(
        TEMPLATE, Site(), directives=[], folder=checkout, code=Path(frozen.stdout),
        command=[sys.executable, "-m", PACKAGE.name, "--version"],
    )  # fmt: skip
    outcome = subprocess.run(
        ["bash"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
