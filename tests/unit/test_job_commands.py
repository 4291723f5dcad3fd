"""`specialm status`, `cancel` and `logs` from the command line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_specialm.cli import app, main
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.processes import log_path as local_log
from megatron_specialm.slurm.logs import newest_logs
from megatron_specialm.slurm.records import log_path, write_registry
from tests.run_folder import Run, make_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return make_run(tmp_path, monkeypatch)


def test_status_from_the_command_line(run: Run) -> None:
    run.submit("7", "slm", keys=["generic"])
    run.slurm_says("7|0|COMPLETED|0|UNLIMITED|node1|None|\n")
    printed = CliRunner().invoke(app, ["status", "config.yaml"])
    assert printed.exit_code == 0 and "47 not submitted" in printed.output
    watched = CliRunner().invoke(app, ["status", "config.yaml", "--watch", "--json"], catch_exceptions=False)
    (line,) = watched.output.splitlines()
    assert json.loads(line)["pipeline"] == "smoke", "no job is left: one look is enough"


def test_cancel(run: Run) -> None:
    def cancel(*more: str) -> str:
        return CliRunner().invoke(app, ["cancel", "config.yaml", *more]).output

    assert "no job is queued or running" in cancel()
    assert not (run.root / ".lock").exists(), "nothing to hold"
    run.submit("7", "slm-tuned")
    run.submit("8", "slm-soup-tuned")
    run.submit("9", "slm", keys=["generic"])
    queue = (
        "7|0|COMPLETED|0|UNLIMITED|node1|None|\n7|1|RUNNING|0|UNLIMITED|node1|None|\n7|2|PENDING|0|UNLIMITED||None|\n"
        "8|0|PENDING|0|UNLIMITED||Dependency|\n9|0|FAILED|0|UNLIMITED|node1|None|\n"
    )
    run.slurm_says(queue)
    assert cancel("slm-soup-tuned") == "cancelled 8: slm-soup-tuned, 1 of 3 elements\n"
    assert cancel() == "cancelled 7: slm-tuned, 2 of 3 elements\n"
    run.slurm_says(queue)
    assert cancel().splitlines() == [
        "cancelled 8: slm-soup-tuned, 1 of 3 elements", "cancelled 7: slm-tuned, 2 of 3 elements"]  # fmt: skip
    assert (run.programs / "cancelled").read_text() == "8\n7\n8 7\n", "those that wait go before what they wait for"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cancel", "config.yaml", "slm-x"], "no stage 'slm-x'; there are tokenizer,"),
        (["logs", "config.yaml", "slm-x"], "no stage 'slm-x'"),
        (["logs", "config.yaml", "slm-tuned", "c3"], "slm-tuned has no task 'c3'; it has scipy, sklearn, torch"),
        (["logs", "config.yaml", "slm-tuned"], "slm-tuned has no log yet"),
    ],
)
def test_mistakes_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["specialm", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


def test_the_newest_log_wherever_it_ran(run: Run) -> None:
    job = run.submit("7", "slm-tuned")
    here, there = local_log(run.root, TaskId("slm-tuned", "scipy")), log_path(run.root, "0001", "slm-tuned", 0)
    other = log_path(run.root, "0001", "slm-tuned", 2)
    for path, age in ((here, 100), (there, 200), (other, 50)):
        _write(path, age)
    assert newest_logs(run.pipeline, "slm-tuned", None) == [other, there]
    assert newest_logs(run.pipeline, "slm-tuned", "torch") == [other]
    _write(here, 300)
    assert newest_logs(run.pipeline, "slm-tuned", "scipy") == [here]
    write_registry(run.root, [job, replace(job, submission="0002")])
    _write(newer := log_path(run.root, "0002", "slm-tuned", 0), 400)
    assert newest_logs(run.pipeline, "slm-tuned", None) == [other, newer]
    printed = CliRunner().invoke(app, ["logs", "config.yaml", "slm-tuned", "--lines", "2"]).output
    assert printed == f"{other}\n==> {newer} <==\nline 8\nline 9\n"


def _write(path: Path, age: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"line {number}\n" for number in range(10)))
    os.utime(path, (age, age))
