"""Artifacts of other run folders: taken over whole or not at all, and the other folder stays as it was."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_specialm.base.artifacts import (
    LABEL,
    MARKER,
    Cost,
    Marker,
    artifact_folder,
    artifact_link,
    begin_artifact,
    finish_artifact,
    is_complete,
    read_marker,
)
from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.plan import PlannedTask, make_plan, select_tasks, write_resolved
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.reuse import refuse_other_folders, reuse_summary, take_over
from megatron_specialm.slurm.records import read_registry
from tests.processes import together

ROOT = Path(__file__).parents[2]
CONFIG = Path("config.yaml")
TEXT = """
name: small
root: run
text:
  generic: {train: text.txt, test: text.txt}
  domains: {law: {train: text.txt, test: text.txt}}
stages:
  tokenizer: {kind: tokenizer}
  tokens: {kind: tokenize, tokenizer: tokenizer}
  vectors: {kind: embed, tokens: tokens, encoder: {kind: tfidf}}
  clusters: {kind: cluster, vectors: vectors, k: 4}
  assignment: {kind: assign, clusters: clusters, vectors: vectors}
  slm: {kind: train, data: generic, tokens: tokens, model: nano, steps: 2, global_batch_size: 8, schedule: {warmup_steps: 0}}
  perplexity: {kind: evaluate, tokens: tokens, models: [slm]}
"""
SLM, TOKENS = TaskId("slm", "generic"), TaskId("tokens", "generic")
THERE, HERE = Path("runs/there"), Path("runs/here")


def _load(*overrides: str) -> Pipeline:
    return load_pipeline(CONFIG, [f"root={HERE}", f"reuse={THERE}", *overrides])


def _finish(pipeline: Pipeline, root: Path) -> None:
    """A run folder as a run leaves it, with stand-ins for what tasks make: a large file, one in a folder, one written in
    place, and a link."""
    write_resolved(pipeline, root)
    for name, planned in make_plan(pipeline, root).items():
        folder = begin_artifact(root, *name, digest=planned.digest)
        (folder / "step_0000010").mkdir()
        (folder / "train.bin").write_bytes(f"{name} tokens".encode() * 1000)
        (folder / "step_0000010" / "model-00000.safetensors").write_bytes(f"{name} weights".encode())
        (folder / "metrics.jsonl").write_text(f"{name}\n")
        (folder / "latest").symlink_to("step_0000010")
        marker = Marker(planned.digest, Cost(5, 7, 36.0, 72.0, "cpu", 2), {"windows": 3}, {"torch": "2"})
        finish_artifact(root, *name, marker)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[bytes, int, int]]:
    """A working directory with a finished run; what its folder holds."""
    monkeypatch.chdir(tmp_path)
    CONFIG.write_text(TEXT)
    Path("text.txt").write_text("some words\n")
    _finish(load_pipeline(CONFIG, [f"root={THERE}"]), THERE)
    return _content(THERE)


def _content(root: Path) -> dict[str, tuple[bytes, int, int]]:
    """Of every file its bytes, inode and time of change of the content."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in _own(folder)
        if path.name not in (LABEL, "checked.json")
    }


def _own(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def test_what_is_complete_there_is_taken_over_and_costs_what_it_cost(there: dict) -> None:
    plan = make_plan(_load(), HERE)
    assert {planned.state for planned in plan.values()} == {"done elsewhere"} and not (HERE / "slm").exists()
    assert reuse_summary(plan) == f", {len(plan)} taken over from {THERE}"
    take_over(plan, HERE)
    assert {planned.state for planned in make_plan(_load(), HERE).values()} == {"done"}
    for name in plan:
        assert _files(artifact_link(HERE, *name)) == _files(artifact_link(THERE, *name))
        assert os.readlink(artifact_link(HERE, *name) / "latest") == "step_0000010"
        assert read_marker(artifact_link(HERE, *name)) == read_marker(artifact_link(THERE, *name))
    assert _content(THERE) == there
    assert not [*HERE.rglob(".*.tmp")], "nothing is left aside"


def test_large_files_are_links_and_what_is_written_in_place_is_not(there: dict) -> None:
    take_over(make_plan(_load(), HERE), HERE)
    shared = {path.name for path in _own(HERE) if path.stat().st_nlink > 1}
    assert shared == {"train.bin", "model-00000.safetensors"}
    assert all(path.stat().st_nlink == 1 for path in _own(HERE) if path.name in ("metrics.jsonl", "task.json"))


def test_nothing_is_written_through_a_link_when_a_task_is_begun_again(there: dict) -> None:
    """Whoever removes a marker has the task done again, and its files written over in place: there as here."""
    take_over(make_plan(_load(), HERE), HERE)
    for root, other in ((HERE, THERE), (THERE, HERE)):
        before = _files(artifact_link(other, *TOKENS))
        marker = read_marker(artifact_link(root, *TOKENS))
        assert marker is not None
        (artifact_link(root, *TOKENS) / MARKER).unlink()
        folder = begin_artifact(root, *TOKENS, digest=marker.digest)
        with (folder / "train.bin").open("r+b") as file:
            file.write(b"another")
        assert (folder / "train.bin").read_bytes().startswith(b"another")
        assert _files(artifact_link(other, *TOKENS)) == before


def test_another_seed_of_trainings_takes_over_all_but_them(there: dict) -> None:
    pipeline = _load("training_seed=1")
    plan = make_plan(pipeline, HERE)
    kinds: dict[str, set[str]] = {}
    for name, planned in plan.items():
        kinds.setdefault(planned.state, set()).add(pipeline.stages[name.stage].kind)
    assert kinds["done elsewhere"] == {"tokenizer", "tokenize", "embed", "cluster", "assign"}
    assert kinds["to do"] == {"train", "evaluate"}
    take_over(plan, HERE)
    assert {name for name in plan if is_complete(HERE, *name, digest=plan[name].digest)} == {
        name for name, planned in plan.items() if planned.state == "done elsewhere"
    }
    assert not artifact_link(HERE, *SLM).exists() and plan[SLM].digest != read_marker(artifact_link(THERE, *SLM)).digest  # type: ignore[union-attr]


def test_what_is_stale_here_makes_room(there: dict) -> None:
    old = load_pipeline(CONFIG, [f"root={HERE}", "seed=3"])
    _finish(old, HERE)
    plan = make_plan(_load(), HERE)
    assert plan[SLM].state == "done elsewhere"
    (artifact_link(HERE, *SLM) / "of-seed-3").touch()
    take_over(plan, HERE)
    assert not (artifact_link(HERE, *SLM) / "of-seed-3").exists()
    assert is_complete(HERE, *SLM, digest=plan[SLM].digest) and _content(THERE) == there


def test_a_part_takes_over_what_it_rests_on(there: dict) -> None:
    plan = make_plan(_load("training_seed=1"), HERE)
    chosen = select_tasks(plan, only="slm", until=None)
    assert {str(name) for name in chosen} == {"slm/generic", "tokenizer/generic", "tokens/generic"}
    assert not any(
        planned.elsewhere for planned in select_tasks(make_plan(_load(), THERE), only="slm", until=None).values()
    )


def test_folders_are_looked_at_in_order_and_the_configs_own_is_none(there: dict) -> None:
    second = load_pipeline(CONFIG, ["root=runs/second", "training_seed=1"])
    _finish(second, Path("runs/second"))
    pipeline = _load(f"reuse=[{HERE}, {THERE}, runs/second]", "training_seed=1")
    plan = make_plan(pipeline, HERE)
    assert plan[TOKENS].elsewhere == THERE and plan[SLM].elsewhere == Path("runs/second")
    refuse_other_folders(pipeline)  # its own root, which is not there yet, is no mistake


def test_a_folder_that_is_no_run_is_refused(there: dict) -> None:
    Path("runs/empty").mkdir()
    for folder in ("runs/empty", "runs/missing"):
        with pytest.raises(ConfigError, match=rf"reuse: {folder}: is not a run folder \(it has no pipeline.yaml\)"):
            refuse_other_folders(_load(f"reuse={folder}"))


def test_what_is_made_anew_meanwhile_is_not_taken_over(there: dict) -> None:
    plan = make_plan(_load(), HERE)
    begin_artifact(THERE, *SLM, digest=plan[SLM].digest)
    with pytest.raises(
        ArtifactError, match=r"slm/generic/[0-9a-f]{16}: was removed or redone while it was being copied"
    ):
        take_over(plan, HERE)
    assert not artifact_link(HERE, *SLM).exists() and read_marker(artifact_link(HERE, *SLM)) is None


def test_damage_does_not_come_back_through_a_link(there: dict) -> None:
    """One flipped bit is in both folders: whoever removes the marker here is told of the one there, which ends it."""
    take_over(make_plan(_load(), HERE), HERE)
    mine, theirs = (artifact_folder(root, *TOKENS, make_plan(_load(), HERE)[TOKENS].digest) for root in (HERE, THERE))
    with (mine / "train.bin").open("r+b") as file:
        file.write(b"T")
    (mine / MARKER).unlink()
    wanted = rf"{theirs}/train\.bin: SHA-256 is not what it was .* or remove {theirs}/done\.json and run again"
    with pytest.raises(ArtifactError, match=wanted):
        take_over(make_plan(_load(), HERE), HERE)
    assert make_plan(_load(), HERE)[TOKENS].state == "done elsewhere" and not list(HERE.rglob(".*.tmp"))
    (theirs / MARKER).unlink()
    assert make_plan(_load(), HERE)[TOKENS].state == "to do"


def test_what_another_job_has_taken_over_since_is_kept(there: dict) -> None:
    plan = make_plan(_load(), HERE)
    take_over(plan, HERE)
    first = {name: artifact_link(HERE, *name).stat().st_ino for name in plan}
    take_over(plan, HERE)
    assert {name: artifact_link(HERE, *name).stat().st_ino for name in plan} == first


def test_jobs_that_share_a_folder_take_over_at_the_same_time(there: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECIALM_INCARNATION", "7_0/0")  # they share the folder's lock
    together(lambda: take_over(make_plan(_load(), HERE), HERE))
    assert {planned.state for planned in make_plan(_load(), HERE).values()} == {"done"}
    assert _content(THERE) == there and not list(HERE.rglob(".*.tmp"))


def test_what_a_kill_has_left_aside_goes_when_the_task_is_begun(there: dict) -> None:
    plan = make_plan(_load(), HERE)
    final = artifact_folder(HERE, *SLM, plan[SLM].digest)
    aside = final.with_name(f".{final.name}.0123abcd.tmp")
    aside.mkdir(parents=True)
    os.link(artifact_link(THERE, *SLM) / "train.bin", aside / "train.bin")
    begin_artifact(HERE, *SLM, digest=plan[SLM].digest)
    assert not aside.exists() and _content(THERE) == there


def test_on_another_filesystem_it_is_a_copy(there: dict) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == Path.cwd().stat().st_dev:
        pytest.skip("no second filesystem")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        root = Path(folder) / "run"
        plan = make_plan(_load(f"root={root}"), root)
        take_over(plan, root)
        assert {planned.state for planned in make_plan(_load(f"root={root}"), root).values()} == {"done"}
        assert all(path.stat().st_nlink == 1 for path in _own(root))
        assert _files(artifact_link(root, *SLM)) == _files(artifact_link(THERE, *SLM))
    assert _content(THERE) == there


def _submit(*arguments: str) -> str:
    """Of a cluster that takes every job."""
    programs = Path("programs")
    programs.mkdir(exist_ok=True)
    for name, says in {"sbatch": "101", "squeue": "", "scontrol": ""}.items():
        (programs / name).write_text(f"#!/bin/sh\necho {says}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{programs.resolve()}:{os.environ['PATH']}"}
    command = [
        sys.executable,
        "-m",
        "megatron_specialm",
        "submit",
        "config.yaml",
        f"root={HERE}",
        f"reuse={THERE}",
        *arguments,
    ]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_submit_takes_over_before_jobs_are_queued(there: dict) -> None:
    said = _submit("training_seed=1", "--dry-run")
    assert f"small: 3 tasks to submit, 9 taken over from {THERE}, in {HERE}" in said
    assert not (HERE / "tokens").exists()
    said = _submit("training_seed=1")
    assert f"small: 3 tasks submitted, 0 on their way, 0 done, 9 taken over from {THERE}, in {HERE}" in said
    assert [job.stage for job in read_registry(HERE)] == ["slm", "perplexity"] and not read_registry(HERE)[0].after
    states = {name.stage: planned.state for name, planned in make_plan(_load("training_seed=1"), HERE).items()}
    assert states.pop("slm") == states.pop("perplexity") == "to do" and set(states.values()) == {"done"}
    # Nodes may not see the other folder: jobs do not look there.
    assert load_pipeline(HERE / "jobs" / "0001" / "pipeline.yaml").reuse == [] and _content(THERE) == there


def _die_at(moment: int, plan: dict[TaskId, PlannedTask]) -> None:
    """Take over, and be killed before that change of the filesystem."""
    left = moment

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in CHANGES:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    take_over(plan, HERE)


CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "shutil.copyfile"}


def test_killed_at_any_moment_it_is_taken_over_by_the_next(there: dict) -> None:
    _finish(load_pipeline(CONFIG, [f"root={HERE}", "seed=3"]), HERE)
    moment, survived = 0, False
    while not survived:
        moment += 1
        plan = {name: planned for name, planned in make_plan(_load(), HERE).items() if name.stage in ("slm", "tokens")}
        process = multiprocessing.get_context("fork").Process(target=_die_at, args=(moment, plan))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        survived = process.exitcode == 0
        for name, planned in make_plan(_load(), HERE).items():
            if planned.state == "done":
                whole = (artifact_folder(root, *name, planned.digest) for root in (HERE, THERE))
                assert len({tuple(_files(folder).items()) for folder in whole}) == 1
        assert _content(THERE) == there
    assert moment > 10
    assert {make_plan(_load(), HERE)[name].state for name in (SLM, TOKENS)} == {"done"}
    assert not [*HERE.rglob(".*.tmp")]
