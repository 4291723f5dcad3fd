"""The status of a run folder, made by the functions that make real ones; Slurm's part as it printed it."""

import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megatron_specialm.base.artifacts import Cost, Marker, begin_artifact, finish_artifact
from megatron_specialm.cli import app, main
from megatron_specialm.config.graph import TaskId
from megatron_specialm.config.lineage import setup_of
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.launch.logs import log_path as local_log
from megatron_specialm.launch.plan import PlannedTask, make_plan
from megatron_specialm.slurm.logs import newest_logs
from megatron_specialm.slurm.queue import Element
from megatron_specialm.slurm.records import (
    Attempt,
    AttemptBegin,
    AttemptEnd,
    JobRecord,
    Outcome,
    TaskRecord,
    log_path,
    read_registry,
    record_begin,
    record_end,
    state_folder,
    submission_folder,
    write_registry,
)
from megatron_specialm.slurm.state import judge
from megatron_specialm.slurm.status import Status, read_status
from megatron_specialm.slurm.status_table import state_text, status_json, status_view
from megatron_specialm.train.metrics import Metrics

SMOKE = configs_folder() / "pipelines" / "smoke.yaml"
DOMAINS = ("scipy", "sklearn", "torch")


@dataclass
class Run:
    """A run folder of the smoke page, and Slurm as far as its commands are asked."""

    pipeline: Pipeline
    root: Path
    programs: Path
    plan: dict[TaskId, PlannedTask]

    def finish(self, *stages: str) -> None:
        """Declare stages done."""
        for name, planned in self.plan.items():
            if name.stage in stages:
                begin_artifact(self.root, *name, digest=planned.digest)
                finish_artifact(self.root, *name, Marker(planned.digest, Cost(1, 1, 36.0, 36.0, "cpu", 1), {}, {}))

    def submit(self, slurm_id: str | None, stage: str, *, keys: Sequence[str] = DOMAINS, ranks: int = 1) -> JobRecord:
        """Register a job with an element per key."""
        elements = tuple((TaskRecord(key, self.plan[TaskId(stage, key)].digest),) for key in keys)
        job = JobRecord("0001", stage, stage, slurm_id, f"specialm-{stage}", elements, (), time.time(), ranks)
        write_registry(self.root, [*read_registry(self.root), job])
        submission_folder(self.root, "0001").mkdir(exist_ok=True)
        return job

    def attempt(self, job: JobRecord, element: int, *ends: tuple[Outcome, str] | None, seconds: float = 90) -> None:
        """Record attempts of an element, each ending so; None: without an end."""
        state = state_folder(self.root, job.submission, job.name, element)
        for number, end in enumerate(ends):
            begin = time.time() - (len(ends) - number) * seconds
            record_begin(state, AttemptBegin(number, f"{job.slurm_id}_{element}", ("node1",), job.ranks, begin))
            if end is not None:
                requeued = number + 1 < len(ends)
                record_end(state, AttemptEnd(number, end[0], 40, end[1], requeued, begin + seconds))

    def train(self, stage: str, key: str, *, step: int, loss: float | None) -> None:
        """Let a training have come to a step."""
        folder = begin_artifact(self.root, stage, key, digest=self.plan[TaskId(stage, key)].digest)
        metrics = Metrics(folder, step=0)
        metrics.write(step=step, steps=400, loss=loss, tokens_per_second=12345.6, eta_seconds=3725.4, mfu=None)
        metrics.close()

    def slurm_says(self, squeue: str) -> None:
        """What squeue prints from now on."""
        (self.programs / "squeue.txt").write_text(squeue)

    def status(self) -> Status:
        return read_status(self.pipeline)

    def text(self, stage: str) -> str:
        return next(state_text(found) for found in self.status().stages if found.stage == stage)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    pipeline = load_pipeline(SMOKE)
    for files in (pipeline.text.generic, *pipeline.text.domains.values()):
        for entry in (*files.train, *files.validation, *files.test):
            Path(entry).parent.mkdir(parents=True, exist_ok=True)
            Path(entry).write_text(json.dumps({"text": entry}) + "\n")
    Path("page.yaml").write_text(f"extends: {SMOKE}\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in {"squeue": f"cat {programs}/squeue.txt", "scancel": f'echo "$@" >> {programs}/cancelled'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    root = Path(pipeline.root)
    yield Run(pipeline, root, programs, make_plan(pipeline, root))


def test_nothing_submitted_needs_no_slurm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    run.finish("tokenizer", "tokens")
    assert [run.text(stage) for stage in ("tokenizer", "tokens", "vectors")] == ["done", "done", "4 not submitted"]
    assert run.status().stages[1].device_hours == pytest.approx(0.04), "four tasks of 36 s, run on this machine"
    assert not run.status().is_live


def test_an_array_is_summarised(run: Run) -> None:
    keys = [f"slm.{key}" for key in ("generic",)] + [f"slm-tuned.{key}" for key in DOMAINS]
    run.submit("7", "perplexity", keys=keys)
    run.slurm_says(
        "7|0|PENDING|0|UNLIMITED||JobArrayTaskLimit|\n7|1|RUNNING|0|9:42|node1|None|\n"
        "7|2|RUNNING|2|9:42|node[2-3]|None|\n7|3|PENDING|0|UNLIMITED||JobArrayTaskLimit|\n"
    )
    wanted = "2 running on node1, node[2-3], restarted 2x; 2 pending (JobArrayTaskLimit); 37 not submitted"
    assert run.text("perplexity") == wanted
    assert run.status().is_live


def test_what_is_done_is_no_more_shown(run: Run) -> None:
    run.submit("7", "slm-tuned")
    run.finish("slm-tuned")
    run.slurm_says("7|0|COMPLETING|0|9:42|node1|None|\n")
    assert run.text("slm-tuned") == "done"


def test_the_progress_of_trainings(run: Run) -> None:
    job = run.submit("7", "slm-tuned", ranks=4)
    run.slurm_says("".join(f"7|{number}|RUNNING|0|UNLIMITED|node1|None|\n" for number in range(3)))
    for number, (key, loss) in enumerate({"scipy": 4.25, "sklearn": None, "torch": 5.5}.items()):
        run.train("slm-tuned", key, step=12 + number, loss=loss)
        run.attempt(job, number, None, seconds=900)
    stage = next(stage for stage in run.status().stages if stage.stage == "slm-tuned")
    assert [(training.key, training.step, training.loss) for training in stage.trainings] == [
        ("scipy", 12, 4.25), ("sklearn", 13, None), ("torch", 14, 5.5)]  # fmt: skip
    assert stage.device_hours == pytest.approx(3 * 4 * 900 / 3600, rel=0.01), "three elements of four ranks"
    assert "step 12-14/400, loss 4.250-5.500, 37,037 tokens/s, ETA 1:02:05" in _render(run.status(), 150)


def test_the_metrics_of_other_settings_are_no_progress(run: Run) -> None:
    run.submit("7", "slm-tuned")
    run.slurm_says("7|0|RUNNING|0|UNLIMITED|node1|None|\n")
    run.train("slm-tuned", "scipy", step=12, loss=1.0)
    begin_artifact(run.root, "slm-tuned", "scipy", digest="another")
    Metrics(run.root / "slm-tuned/scipy", step=0).write(step=3, steps=4, tokens_per_second=1.0, eta_seconds=1.0, loss=1)
    assert not any(stage.trainings for stage in run.status().stages)


def test_hours_of_attempts_that_were_lost(run: Run) -> None:
    """A lost attempt lasted until the next began; the last one until the log was last written."""
    job = run.submit("7", "slm", keys=["generic"], ranks=2)
    run.attempt(job, 0, None, ("preempted", ""), None, seconds=600)
    run.slurm_says("7|0|PENDING|3|UNLIMITED||BeginTime|\n")
    log_path(run.root, "0001", "slm", 0).write_text("step 1\n")
    (hours,) = (stage.device_hours for stage in run.status().stages if stage.stage == "slm")
    assert hours == pytest.approx(2 * 3 * 600 / 3600, rel=0.01)
    assert run.text("slm") == "pending (BeginTime), restarted 3x"


def test_the_plan_is_the_arithmetic_of_check(run: Run) -> None:
    run.submit("7", "slm-tuned")
    run.slurm_says("")
    assert {stage.planned_hours for stage in run.status().stages} == {None}, "the site does not name its GPUs"
    (submission_folder(run.root, "0001") / "site.yaml").write_text("gpu: H100\n")
    planned = {stage.stage: stage.planned_hours for stage in run.status().stages}
    assert planned["tokens"] is None
    setup_flops = 3 * 30 * setup_of(run.pipeline, "slm-tuned").step_flops
    assert planned["slm-tuned"] == pytest.approx(setup_flops / (0.4 * 989e12) / 3600)


RUNNING = Element("RUNNING", "", "node1", 0, None)
BEGIN = AttemptBegin(0, "7_0", ("node1",), 1, 0.0)


def _ended(outcome: Outcome, *, requeued: bool = False) -> list[Attempt]:
    return [Attempt(BEGIN, AttemptEnd(0, outcome, None, "why", requeued, 1.0))]


@pytest.mark.parametrize(
    ("element", "attempts", "wanted"),
    [
        (RUNNING, _ended("failed"), ("running", "")),
        (replace(RUNNING, state="PENDING", reason="Resources"), [], ("pending", "Resources")),
        (replace(RUNNING, state="CANCELLED", reason="JobArrayTaskLimit"), [], ("cancelled", "")),
        (replace(RUNNING, state="CANCELLED", reason="DependencyNeverSatisfied"), [], ("cancelled", "DependencyNeverSatisfied")),
        (replace(RUNNING, state="NODE_FAIL"), [Attempt(BEGIN, None)], ("failed", "node fail")),
        (replace(RUNNING, state="OUT_OF_MEMORY"), _ended("failed"), ("failed", "out of memory")),
        (replace(RUNNING, state="FAILED", reason="NonZeroExitCode"), [], ("failed", "NonZeroExitCode")),
        (replace(RUNNING, state="FAILED", reason="NonZeroExitCode"), _ended("hang"), ("failed", "hang")),
        (replace(RUNNING, state="FAILED", reason="NonZeroExitCode"), _ended("failed"), ("failed", "")),
        (replace(RUNNING, state="COMPLETED"), _ended("finished"), ("finished", "")),
        (None, _ended("failed"), ("failed", "")),
        (None, _ended("finished"), ("finished", "")),
        (None, _ended("timeout", requeued=True), ("lost", "")),
        (None, [Attempt(BEGIN, None)], ("lost", "")),
        (None, [], ("lost", "")),
    ],
)  # fmt: skip
def test_slurm_is_believed_of_the_living_and_the_records_of_the_dead(
    element: Element | None, attempts: list[Attempt], wanted: tuple[str, str]
) -> None:
    assert judge(element, attempts) == wanted


def test_a_page_that_has_changed(run: Run) -> None:
    """Jobs for other settings are history, unless they are still in the way; what they made is stale."""
    run.finish("slm")
    run.submit("7", "slm-tuned")
    run.slurm_says("7|0|FAILED|0|UNLIMITED|node1|NonZeroExitCode|\n7|1|RUNNING|0|UNLIMITED|node1|None|\n")
    changed = replace(run, pipeline=load_pipeline(SMOKE, ["stages.slm.steps=7", "stages.slm-tuned.steps=8"]))
    assert changed.text("slm-tuned") == "1 running on node1; 2 not submitted"
    assert changed.text("slm") == "stale"


def test_a_second_submission_counts_for_its_tasks(run: Run) -> None:
    run.submit("7", "slm-tuned")
    run.submit("8", "slm-tuned", keys=["sklearn"])
    failed = "".join(f"7|{number}|FAILED|0|UNLIMITED|node1|NonZeroExitCode|\n" for number in range(3))
    run.slurm_says(f"{failed}8|0|PENDING|0|UNLIMITED||None|\n")
    assert run.text("slm-tuned") == "1 pending; 2 failed (NonZeroExitCode)"


def test_a_job_whose_submit_died_is_found_by_its_comment(run: Run) -> None:
    run.submit(None, "slm", keys=["generic"])
    program = run.programs / "squeue"
    program.write_text(
        "#!/bin/sh\ncase \"$*\" in *%k*) echo '7|specialm-slm';; *) echo '7|0|PENDING|0|UNLIMITED||None|';; esac\n"
    )
    assert run.text("slm") == "pending"
    program.write_text("#!/bin/sh\ntrue\n")
    assert run.text("slm") == "not submitted"


# --- what it looks like ------------------------------------------------------------------------------------------------


def _render(status: Status, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(status_view(status))
    return output.getvalue()


def _messy(run: Run) -> Status:
    """Something of everything."""
    run.finish("tokenizer", "tokens", "slm")
    tuned = run.submit("123456", "slm-tuned", ranks=8)
    run.submit("123457", "slm-soup-tuned")
    run.submit("123458", "llm", keys=["generic"])
    (submission_folder(run.root, "0001") / "site.yaml").write_text("gpu: H100\n")
    run.slurm_says(
        "123456|0|RUNNING|0|1-09:42:10|gpu-node-[0013-0016]|None|\n"
        "123456|1|RUNNING|3|9:42|gpu-node-0017|None|\n"
        "123456|2|FAILED|0|UNLIMITED|gpu-node-0018|NonZeroExitCode|\n"
        + "".join(f"123457|{number}|CANCELLED|0|UNLIMITED||DependencyNeverSatisfied|\n" for number in range(3))
        + "123458|0|PENDING|0|UNLIMITED||ReqNodeNotAvail, UnavailableNodes:gpu-node-[0001-0012]|\n"
    )
    for number, key in enumerate(("scipy", "sklearn")):
        run.train("slm-tuned", key, step=120 + 140 * number, loss=4.31)
        run.attempt(tuned, number, None, seconds=360_000)
    run.attempt(tuned, 2, ("failed", "TrainingError: the loss is not finite at step 40: lower the learning rate"))
    return run.status()


def test_at_80_columns_every_word_is_whole(run: Run) -> None:
    status = _messy(run)
    narrow, wide = _render(status, 80), _render(status, 300)
    assert max(len(line) for line in narrow.splitlines()) <= 80
    frame = str.maketrans("", "", "─")
    assert sorted(narrow.translate(frame).split()) == sorted(wide.translate(frame).split())
    for words in ("DependencyNeverSatisfied", "gpu-node-[0013-0016]", "UnavailableNodes:gpu-node-[0001-0012]",
                  "123456_2 on gpu-node-0018: failed", "the loss is not finite at step 40", " 1,600 ", "6/125"):  # fmt: skip
        assert words in narrow, words
    assert f"log: {run.root}/jobs/0001/slm-tuned.2.log" in narrow


def test_json_says_the_same(run: Run) -> None:
    status = _messy(run)
    said = json.loads(json.dumps(status_json(status), allow_nan=False))
    stage = next(stage for stage in said["stages"] if stage["stage"] == "slm-tuned")
    assert stage["state"] == "2 running on gpu-node-[0013-0016], gpu-node-0017, restarted 3x; 1 failed"
    assert (stage["done"], stage["tasks"]) == (0, 3)
    assert [element["job"] for element in stage["elements"]] == ["123456_0", "123456_1", "123456_2"]
    assert stage["elements"][0]["seconds_left"] == 86400 + 9 * 3600 + 42 * 60 + 10
    assert stage["trainings"][1] == {
        "key": "sklearn", "step": 260, "steps": 400, "loss": 4.31, "tokens_per_second": 12345.6,
        "eta_seconds": 3725.4}  # fmt: skip
    assert stage["failures"] == [{
        "tasks": ["slm-tuned/torch"], "job": "123456_2", "state": "failed", "nodes": "gpu-node-0018",
        "error": "TrainingError: the loss is not finite at step 40: lower the learning rate",
        "log": f"{run.root}/jobs/0001/slm-tuned.2.log"}]  # fmt: skip


def test_a_failure_without_a_record_shows_the_logs_last_line(run: Run) -> None:
    job = run.submit("7", "slm", keys=["generic"])
    run.attempt(job, 0, None)
    run.slurm_says("7|0|OUT_OF_MEMORY|0|UNLIMITED|node1|OutOfMemory|\n")
    log_path(run.root, "0001", "slm", 0).write_text(
        "x" * 100_000 + "\nslurmstepd: error: Detected 1 oom-kill event\n\n"
    )
    said = _render(run.status(), 80)
    assert "slm/generic: job 7_0 on node1: failed\n  slurmstepd: error: Detected 1 oom-kill event\n  log: " in said


@pytest.mark.parametrize(
    ("squeue", "ends", "wanted"),
    [
        ("PENDING", [("hang", "rank 1 on node1 hangs")], "job 7_0 on node1: hang, queued again"),
        ("RUNNING", [("failed", "rank 1 died"), None], "job 7_0 on node1: failed, queued again"),
        ("PENDING", [("timeout", ""), None], "job 7_0 on node1: lost, queued again"),
        ("RUNNING", [("timeout", ""), None], None),
        ("PENDING", [("preempted", "")], None),
        ("RUNNING", [None], None),
        ("PENDING", [], None),
    ],
)
def test_why_a_live_job_had_to_begin_again(
    run: Run, squeue: str, ends: list[tuple[Outcome, str] | None], wanted: str | None
) -> None:
    run.attempt(run.submit("7", "slm", keys=["generic"]), 0, *ends)
    run.slurm_says(f"7|0|{squeue}|1|UNLIMITED|node2|None|\n")
    said = _render(run.status(), 80)
    assert ("log:" not in said) if wanted is None else (f"slm/generic: {wanted}" in said)


# --- the commands ------------------------------------------------------------------------------------------------------


def test_status_from_the_command_line(run: Run) -> None:
    run.submit("7", "slm", keys=["generic"])
    run.slurm_says("7|0|COMPLETED|0|UNLIMITED|node1|None|\n")
    printed = CliRunner().invoke(app, ["status", "page.yaml"])
    assert printed.exit_code == 0 and "41 not submitted" in printed.output
    watched = CliRunner().invoke(app, ["status", "page.yaml", "--watch", "--json"], catch_exceptions=False)
    (line,) = watched.output.splitlines()
    assert json.loads(line)["pipeline"] == "smoke", "no job is left: one look is enough"


def test_cancel(run: Run) -> None:
    def cancel(*more: str) -> str:
        return CliRunner().invoke(app, ["cancel", "page.yaml", *more]).output

    assert "no job is queued or running" in cancel()
    assert not (run.root / ".lock").exists(), "nothing to hold"
    run.submit("7", "slm-tuned")
    run.submit("8", "slm-soup-tuned")
    run.submit("9", "slm", keys=["generic"])
    run.slurm_says(
        "7|0|COMPLETED|0|UNLIMITED|node1|None|\n7|1|RUNNING|0|UNLIMITED|node1|None|\n7|2|PENDING|0|UNLIMITED||None|\n"
        "8|0|PENDING|0|UNLIMITED||Dependency|\n9|0|FAILED|0|UNLIMITED|node1|None|\n"
    )
    assert cancel("slm-soup-tuned") == "cancelled 8: slm-soup-tuned, 1 of 3 elements\n"
    assert cancel().splitlines() == [
        "cancelled 8: slm-soup-tuned, 1 of 3 elements", "cancelled 7: slm-tuned, 2 of 3 elements"]  # fmt: skip
    assert (run.programs / "cancelled").read_text() == "8\n8 7\n", "those that wait go before what they wait for"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cancel", "page.yaml", "slm-x"], "no stage 'slm-x'; there are tokenizer,"),
        (["logs", "page.yaml", "slm-x"], "no stage 'slm-x'"),
        (["logs", "page.yaml", "slm-tuned", "c3"], "slm-tuned has no task 'c3'; it has scipy, sklearn, torch"),
        (["logs", "page.yaml", "slm-tuned"], "slm-tuned has no log yet"),
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
    printed = CliRunner().invoke(app, ["logs", "page.yaml", "slm-tuned", "--lines", "2"]).output
    assert printed == f"{other}\n==> {newer} <==\nline 8\nline 9\n"


def _write(path: Path, age: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"line {number}\n" for number in range(10)))
    os.utime(path, (age, age))
