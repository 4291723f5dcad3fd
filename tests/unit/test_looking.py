"""Commands that only look need not be able to write: a run folder that is mounted read-only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_specialm.cli import app
from tests.conftest import ROOT
from tests.unit.test_results import SMOKE, declare_finished

LOOK = """
import sys
from typer.testing import CliRunner
from megatron_specialm.cli import app
for command in sys.argv[1:]:
    outcome = CliRunner().invoke(app, command.split())
    print(f"== {command}: {outcome.exit_code} {outcome.exception or ''}")
    print(outcome.output)
"""
COMMANDS = [
    "results config.yaml", "results config.yaml --markdown", "plan config.yaml", "status config.yaml", "check config.yaml",
    "figures config.yaml", "submit config.yaml --site site.yaml --dry-run",
]  # fmt: skip


def _in_own_mounts(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A shell that may mount what it likes, for itself alone."""
    unshare = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount anything (unshare)")
    return subprocess.run(
        [*unshare, "bash", "-ec", script, "bash", *arguments], cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip


def test_a_run_folder_that_cannot_be_written_to_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, root = declare_finished(tmp_path)
    (tmp_path / "config.yaml").write_text(f"extends: {SMOKE}\nroot: {root}\n")
    (tmp_path / "site.yaml").write_text("{}\n")
    for text in (tmp_path / "data").rglob("*.jsonl"):
        text.touch()  # its hash is to be taken anew, and cannot be kept
    mount = f"mount --bind {root} {root}; mount -o remount,ro,bind {root}; ! touch {root}/x 2>/dev/null"
    before = sorted(path for path in root.rglob("*"))
    outcome = _in_own_mounts(
        f'{mount}; p=$1; shift; exec {sys.executable} -c "$p" "$@"', LOOK, *COMMANDS, folder=tmp_path
    )
    said = outcome.stdout + outcome.stderr
    for command in COMMANDS:
        assert f"== {command}: 0 \n" in said, said
    assert "slm-nopt" in said and "results.json was not updated: Read-only file system" in said
    assert "smoke: 0 tasks submitted" not in said, "a dry run prints scripts"
    assert (tmp_path / "figures" / "results.md").exists() and sorted(path for path in root.rglob("*")) == before


@pytest.mark.parametrize("command", ["results", "results --markdown", "figures"])
def test_where_nothing_has_been_evaluated_they_say_so(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    declare_finished(tmp_path)  # makes the text
    name, *options = command.split()
    outcome = CliRunner().invoke(app, [name, str(SMOKE), "root=another", *options])
    assert outcome.output == f"another: nothing has been evaluated yet: `specialm run {SMOKE}` does that\n"
    assert not Path("figures").exists()


def test_samples_are_of_the_configs_models_and_of_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The links for users may show what other settings made."""
    monkeypatch.chdir(tmp_path)
    _, root = declare_finished(tmp_path)
    outcome = CliRunner().invoke(app, ["samples", str(SMOKE), f"root={root}", "seed=3"])
    wanted = f"{root}: nothing has been fine-tuned on scipy yet: `specialm run {SMOKE}` does that"
    assert " ".join(outcome.output.split()) == wanted and outcome.exit_code == 0
