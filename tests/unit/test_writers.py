"""One writer in a run folder, and tasks that are what was planned."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_specialm.base import lock
from megatron_specialm.base.artifacts import artifact_folder
from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import ArtifactError, ConfigError, MachineError
from megatron_specialm.base.files import read_json
from megatron_specialm.base.lock import hold_folder, hold_task
from megatron_specialm.cli import app
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.graph.file_hashes import CACHE
from megatron_specialm.graph.plan import refuse_other_work, write_resolved
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.inline import _as_found
from megatron_specialm.slurm.state import adopt_unattended
from tests.run_folder import Run, make_run

OTHER = "stages.slm.optimizer.learning_rate=0.5"
RANK_0 = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
TOKENS = TaskId("tokens", "scipy")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = make_run(tmp_path, monkeypatch)
    write_resolved(made.pipeline, made.root)
    made.finish("tokenizer")
    monkeypatch.setattr(lock, "HANDOVER_SECONDS", 0.0)
    return made


def _content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("environment", [{}, RANK_0], ids=["local", "first rank"])
def test_a_refused_run_has_written_nothing(
    run: Run, environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with hold_folder(run.root):
        before = _content(run.root)
        outcome = CliRunner().invoke(app, ["run", "config.yaml", OTHER])
        assert isinstance(outcome.exception, MachineError) and "another command" in str(outcome.exception)
        assert _content(run.root) == before


def test_a_run_beside_a_jobs_task_has_written_no_config(run: Run) -> None:
    run.submit("7", "tokens")
    run.slurm_says("7|0|RUNNING|0|1:00:00|node1|None|\n")
    config = (run.root / "pipeline.yaml").read_bytes()
    for override, said in (
        (OTHER, "does it"),
        ("stages.tokens.context_length=16", "makes it from other settings or text"),
    ):
        outcome = CliRunner().invoke(app, ["run", "config.yaml", override])
        assert isinstance(outcome.exception, MachineError), outcome.exception
        assert f"{TOKENS}: job 7_0 {said}: let it end" in str(outcome.exception)
    assert (run.root / "pipeline.yaml").read_bytes() == config


@pytest.mark.parametrize("command", ["run", "submit"])
def test_the_layout_of_an_earlier_version_stays_while_a_job_may_run_it(run: Run, command: str) -> None:
    label = run.root / "slm/generic/task.json"
    label.parent.mkdir(parents=True)
    label.write_text(json.dumps({"digest": "a" * 64}))
    run.submit("7", "tokens")
    run.slurm_says("7|0|RUNNING|0|1:00:00|node1|None|\n")
    outcome = CliRunner().invoke(app, [command, "config.yaml"])
    assert isinstance(outcome.exception, MachineError), outcome.exception
    assert f"an earlier version made this folder, and job 7_0, for {TOKENS}, may still run" in str(outcome.exception)
    assert label.exists() and not label.parent.is_symlink()
    run.slurm_says("")
    adopt_unattended(run.root)
    assert artifact_folder(run.root, "slm", "generic", "a" * 64).is_dir() and not label.exists()


def test_who_looks_beside_a_run_writes_no_results(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with hold_folder(run.root):
        assert CliRunner().invoke(app, ["results", "config.yaml"]).exit_code == 0
        assert not (run.root / "results.json").exists()
    assert "results.json was not updated" in caplog.text and "another command" in caplog.text
    assert CliRunner().invoke(app, ["results", "config.yaml"]).exit_code == 0
    assert (run.root / "results.json").exists()


def test_jobs_share_a_task_and_keep_others_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HANDOVER_SECONDS", 0.0)
    monkeypatch.setenv("SPECIALM_INCARNATION", "7_0/0")
    with hold_task(tmp_path, "slm", "generic"):
        monkeypatch.setenv("SPECIALM_INCARNATION", "7_0/1")
        with hold_task(tmp_path, "slm", "generic"):
            pass
        monkeypatch.delenv("SPECIALM_INCARNATION")
        refused = pytest.raises(MachineError, match="slm/generic: 7_0/1 is doing this task")
        with refused, hold_task(tmp_path, "slm", "generic"):
            pass
        with hold_task(tmp_path, "slm-is", "generic"), hold_folder(tmp_path):
            pass
    with hold_task(tmp_path, "slm", "generic"):
        monkeypatch.setenv("SPECIALM_INCARNATION", "7_0/2")
        with pytest.raises(MachineError, match="is doing this task"), hold_task(tmp_path, "slm", "generic"):
            pass


def test_what_was_planned_is_done(run: Run) -> None:
    planned = run.plan[TOKENS]
    as_recorded = json.loads(json.dumps(planned.made_from))
    refuse_other_work(run.pipeline, run.root, planned.task, as_recorded)
    others = load_pipeline(Path("config.yaml"), [OTHER])
    refuse_other_work(others, run.root, planned.task, as_recorded)  # of another stage


def test_work_that_is_no_longer_what_was_planned_is_refused(run: Run) -> None:
    planned = run.plan[TOKENS]
    cached = read_json(run.root / CACHE)
    other = load_pipeline(Path("config.yaml"), ["stages.tokens.context_length=16"])
    with pytest.raises(
        ArtifactError, match=rf"{TOKENS}: was planned as {planned.digest[:16]} .*: its settings changed"
    ):
        refuse_other_work(other, run.root, planned.task, planned.made_from)
    Path(planned.task.files["train"][0]).write_text('{"text": "other"}\n')
    with pytest.raises(ArtifactError, match=rf"planned as {planned.digest[:16]} and would be .*: its files changed"):
        refuse_other_work(run.pipeline, run.root, planned.task, planned.made_from)
    assert read_json(run.root / CACHE).keys() == cached.keys(), "what other tasks read is not hashed again"
    with pytest.raises(ArtifactError, match="its inputs changed"):
        slm = run.plan[TaskId("slm", "generic")]
        refuse_other_work(run.pipeline, run.root, slm.task, {**slm.made_from, "inputs": {}})


def test_ranks_go_by_the_plan_of_the_first(run: Run) -> None:
    world, own = World(1, 2, 1, "", "test"), run.plan[TOKENS].digest
    assert _as_found(run.plan, {str(TOKENS): ("done", own)}, world) == {TOKENS: replace(run.plan[TOKENS], state="done")}
    with pytest.raises(ConfigError, match=rf"rank 1 would make it as {own[:16]}, rank 0 as {'0' * 16}"):
        _as_found(run.plan, {str(TOKENS): ("done", "0" * 64)}, world)
    with pytest.raises(ConfigError, match="slm/other: rank 1 would make it as nothing, rank 0 as"):
        _as_found(run.plan, {"slm/other": ("to do", own)}, world)
