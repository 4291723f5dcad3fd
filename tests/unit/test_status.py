"""The status of a run folder: of each stage, of what has failed, and what it looks like."""

import io
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_specialm.base.artifacts import Cost, Marker, artifact_link, begin_artifact, finish_artifact, read_marker
from megatron_specialm.base.files import write_json
from megatron_specialm.base.process_status import Count
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.graph.lineage import setup_of
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm.commands import Element
from megatron_specialm.slurm.records import (
    Attempt,
    AttemptBegin,
    AttemptEnd,
    Note,
    Outcome,
    log_path,
    record_begin,
    record_end,
    state_folder,
    submission_folder,
    write_note,
)
from megatron_specialm.slurm.state import judge
from megatron_specialm.slurm.status import Status
from megatron_specialm.slurm.status_view import status_json, status_view
from megatron_specialm.train.metrics import Metrics
from tests.run_folder import DOMAINS, SMOKE, Run, make_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return make_run(tmp_path, monkeypatch)


def test_nothing_submitted_needs_no_slurm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    run.finish("tokenizer", "tokens")
    assert [run.text(stage) for stage in ("tokenizer", "tokens", "vectors")] == ["done", "done", "5 not submitted"]
    assert run.status().stages[1].device_hours == pytest.approx(0.04), "four tasks of 36 s, run on this machine"
    assert not run.status().is_live


def test_hours_are_of_the_configs_own_work(run: Run) -> None:
    """Settings that go back find the old work beside the new: it is what counts, wherever the link for users points."""
    run.finish("tokens")
    name = TaskId("tokens", "generic")
    begin_artifact(run.root, *name, digest="f" * 64)
    finish_artifact(run.root, *name, Marker("f" * 64, Cost(1, 1, 7236.0, 7236.0, "cpu", 1), {}, {}))
    assert run.status().stages[1].device_hours == pytest.approx(0.04), "four tasks of 36 s"


def test_what_the_cap_ended_is_told(run: Run) -> None:
    run.finish("slm-tuned", "llm-tuned")
    assert "warning" not in _render(run.status(), 100)
    marker = read_marker(artifact_link(run.root, "slm-tuned", "scipy"))
    assert marker is not None
    values = {"steps": 30, "best_step": 30, "capped": True}
    finish_artifact(run.root, "slm-tuned", "scipy", replace(marker, values=values))
    status = run.status()
    said = "the cap on steps, not early stopping, ended slm-tuned/scipy (30 steps, best step 30: still falling)"
    assert f"warning: {said}" in _render(status, 400)
    warnings = {stage["stage"]: stage["warnings"] for stage in status_json(status)["stages"] if stage["warnings"]}
    assert list(warnings) == ["slm-tuned"] and warnings["slm-tuned"][0].startswith(said)
    assert max(map(len, _render(status, 80).splitlines())) <= 80


def test_an_array_is_summarised(run: Run) -> None:
    keys = [f"slm.{key}" for key in ("generic",)] + [f"slm-tuned.{key}" for key in DOMAINS]
    run.submit("7", "perplexity", keys=keys)
    run.slurm_says(
        "7|0|PENDING|0|UNLIMITED||JobArrayTaskLimit|\n7|1|RUNNING|0|9:42|node1|None|\n"
        "7|2|RUNNING|2|9:42|node[2-3]|None|\n7|3|PENDING|0|UNLIMITED||JobArrayTaskLimit|\n"
    )
    wanted = "2 running on node1, node[2-3], restarted 2x; 2 pending (JobArrayTaskLimit); 43 not submitted"
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
    assert "step 12-14/400, loss 4.250-5.500, 37,037 tokens/s, fill 97%, ETA 1:02:05" in _render(run.status(), 150)


def test_how_far_other_tasks_are(run: Run) -> None:
    run.submit("7", "vectors")
    run.slurm_says("7|0|RUNNING|0|UNLIMITED|node1|None|\n7|1|RUNNING|0|UNLIMITED|node2|None|\n")
    for key, done in {"scipy": 3_000, "sklearn": 1_000, "torch": 5}.items():  # that of torch does not run any more
        folder = begin_artifact(run.root, "vectors", key, digest=run.plan[TaskId("vectors", key)].digest)
        write_json(folder / "progress.json", asdict(Count(done, 10_000, "windows", 400.0, (10_000 - done) / 400)))
    assert "4,000 of 20,000 windows, 800 per second, 0:22 left" in _render(run.status(), 150)
    (folder.parent.parent / "scipy" / run.plan[TaskId("vectors", "scipy")].digest[:16] / "progress.json").unlink()
    assert "1,000 of 10,000 windows, 400 per second, 0:22 left" in _render(run.status(), 150)
    (stage,) = (stage for stage in status_json(run.status())["stages"] if stage["stage"] == "vectors")
    assert [count["done"] for count in stage["counts"]] == [1_000]


def test_the_metrics_of_other_settings_are_no_progress(run: Run) -> None:
    run.submit("7", "slm-tuned")
    run.slurm_says("7|0|RUNNING|0|UNLIMITED|node1|None|\n")
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


@pytest.mark.parametrize("shift", [-7200, 7200])
def test_hours_are_measured_not_read_from_clocks(run: Run, shift: float) -> None:
    """The clock is set in each of three attempts: one ended, one lost, one under way."""
    job = run.submit("7", "slm", keys=["generic"], ranks=2)
    state, now = state_folder(run.root, "0001", "slm", 0), time.time()
    for number in range(3):
        record_begin(state, AttemptBegin(number, "7_0", ("node1",), job.ranks, now + number * shift))
        write_note(state, number, Note(None, 300.0))
    record_end(state, AttemptEnd(2, "preempted", None, "", True, now + 3 * shift, 360.0))
    run.slurm_says("7|0|RUNNING|3|UNLIMITED||None|\n")
    (hours,) = (stage.device_hours for stage in run.status().stages if stage.stage == "slm")
    assert hours == pytest.approx(2 * (300 + 300 + 360) / 3600)


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


def test_a_config_that_has_changed(run: Run) -> None:
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
                  "123456_2 on gpu-node-0018: failed", "the loss is not finite at step 40", " 1,600 ", "6/132"):  # fmt: skip
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
        "eta_seconds": 3725.4, "fill": 0.97}  # fmt: skip
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
