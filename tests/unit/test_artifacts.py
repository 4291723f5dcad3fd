"""Artifacts are kept by digest: nothing of other settings, and nothing foreign, is ever removed; damage is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_specialm.base import hash_cache
from megatron_specialm.base.artifacts import (
    LABEL,
    MARKER,
    Cost,
    Marker,
    artifact_folder,
    artifact_folders,
    artifact_link,
    begin_artifact,
    finish_artifact,
    is_complete,
    read_marker,
)
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import ArtifactError, ConfigError, SpecialmError
from megatron_specialm.base.files import publish_folder, read_json, sha256_file, sha256_json
from megatron_specialm.base.integrity import CHECKED, check_files
from megatron_specialm.cli import app
from megatron_specialm.graph.earlier_layout import adopt_earlier_layout, has_earlier_layout, refuse_earlier_layout
from megatron_specialm.graph.plan import PlannedTask, link_artifacts, make_plan, write_resolved
from megatron_specialm.graph.tasks import Task, TaskId
from megatron_specialm.run.verify import verify
from megatron_specialm.run.worker import _begin
from tests.processes import together
from tests.run_folder import Run, make_run

NAME = "slm", "generic"
A, B = "a" * 64, "b" * 64


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return make_run(tmp_path, monkeypatch)


def _made(root: Path, digest: str, text: str = "weights") -> Path:
    """A finished artifact with a published step, a link and what a killed writer has left."""
    folder = begin_artifact(root, *NAME, digest=digest)
    aside = folder / ".step.tmp"
    aside.mkdir(exist_ok=True)
    (aside / "model.bin").write_text(text)
    publish_folder(aside, folder / "step_0000001")
    (folder / "notes.jsonl").write_text("{}\n")
    (folder / ".x.123.tmp").touch()
    (folder / "latest").unlink(missing_ok=True)
    (folder / "latest").symlink_to("step_0000001")
    finish_artifact(root, *NAME, Marker(digest, Cost(1, 1, 1.0, 1.0, "cpu", 1), {"loss": 2.5, "by": {1: 0.1}}, {}))
    return folder


def test_users_see_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    first = begin_artifact(tmp_path, *NAME, digest=A)
    place = artifact_link(tmp_path, *NAME)
    assert place.samefile(first), "until there is a whole one, the work is seen"
    first = _made(tmp_path, A)
    second = begin_artifact(tmp_path, *NAME, digest=B)
    assert place.samefile(first) and second != first
    _made(tmp_path, B)
    assert place.samefile(second) and os.readlink(place).startswith("../artifacts/")
    assert is_complete(tmp_path, *NAME, digest=A) and artifact_folders(tmp_path, *NAME) == [first, second]


def test_a_run_folder_can_be_moved(tmp_path: Path) -> None:
    _made(tmp_path / "here", A)
    (tmp_path / "here").rename(tmp_path / "there")
    assert (artifact_link(tmp_path / "there", *NAME) / "notes.jsonl").exists()


def test_going_back_to_old_settings_finds_the_old_work(run: Run) -> None:
    run.finish("tokenizer")
    name = next(name for name in run.plan if name.stage == "tokenizer")
    changed = run.pipeline.model_copy(update={"seed": 5})
    other = make_plan(changed, run.root)[name]
    assert other.state == "stale"
    begin_artifact(run.root, *name, digest=other.digest)
    finish_artifact(run.root, *name, Marker(other.digest, Cost(1, 1, 1.0, 1.0, "cpu", 1), {}, {}))
    plan = make_plan(run.pipeline, run.root)
    assert plan[name].state == "done"
    link_artifacts(plan, run.root)
    assert artifact_link(run.root, *name).samefile(artifact_folder(run.root, *name, run.plan[name].digest))
    assert make_plan(changed, run.root)[name].state == "done"


def test_what_stands_where_users_look_and_is_no_link_is_nobodys_to_remove(tmp_path: Path) -> None:
    thesis = tmp_path / "slm/generic/thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years")
    with pytest.raises(ArtifactError, match=r"slm/generic: is not a link of this program.*move it away"):
        begin_artifact(tmp_path, *NAME, digest=A)
    assert thesis.read_text() == "years"


def test_a_folder_that_holds_files_and_no_run_is_no_root(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "tokens/generic").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"root: .*home holds files and no run \(tokens\): choose an empty"):
        write_resolved(run.pipeline, home)
    write_resolved(run.pipeline, tmp_path / "new")
    (tmp_path / "new/notes.txt").touch()
    write_resolved(run.pipeline, tmp_path / "new")


def test_without_its_label_an_attempt_goes_on_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    folder = begin_artifact(tmp_path, *NAME, digest=A)
    (folder / "step").touch()
    (folder / LABEL).unlink()
    assert (begin_artifact(tmp_path, *NAME, digest=A) / "step").exists()
    (folder / LABEL).write_text(json.dumps({**read_json(folder / LABEL), "digest": A[:-1] + "c"}))
    with pytest.raises(ArtifactError, match=r"task\.json: is of another digest"):
        begin_artifact(tmp_path, *NAME, digest=A)
    (folder / LABEL).write_text(json.dumps({**read_json(folder / LABEL), "digest": A, "made_from": {"steps": 1}}))
    with pytest.raises(ArtifactError, match=r"task\.json: its made_from does not have its digest"):
        begin_artifact(tmp_path, *NAME, digest=A)
    assert (folder / "step").exists()


def test_the_marker_lists_every_file(tmp_path: Path) -> None:
    folder = _made(tmp_path, A)
    marker = read_marker(folder)
    assert marker is not None
    assert set(marker.files) == {"notes.jsonl", "step_0000001/model.bin", "step_0000001/manifest.json"}
    assert marker.values == {"loss": 2.5, "by": {"1": 0.1}}
    check_files(folder, marker.files)


@pytest.mark.parametrize("name", ["notes.jsonl", "step_0000001/model.bin", "step_0000001/manifest.json"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    folder = _made(tmp_path, A)
    marker = read_marker(folder)
    assert marker is not None
    path, whole = folder / name, (folder / name).read_bytes()
    check_files(folder, marker.files)
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert is_complete(tmp_path, *NAME, digest=A), "sizes alone are looked at, always"
    with pytest.raises(ArtifactError, match=rf"{name}: SHA-256 is not what it was"):
        check_files(folder, marker.files)
    path.write_bytes(whole[:-1])
    assert not is_complete(tmp_path, *NAME, digest=A)
    with pytest.raises(ArtifactError, match=rf"{name}: {len(whole) - 1} bytes, and {len(whole)} when it was made"):
        check_files(folder, marker.files)
    path.unlink()
    assert not is_complete(tmp_path, *NAME, digest=A)
    with pytest.raises(ArtifactError, match=rf"{name}: No such file"):
        check_files(folder, marker.files)


def test_what_was_checked_is_not_read_again_where_its_folder_has_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own name, by the link for users, and in a run folder that was moved; what is gone is forgotten."""
    folder, read = _made(tmp_path / "here", A), []
    marker = read_marker(folder)
    assert marker is not None
    monkeypatch.setattr(hash_cache, "TICK_NS", 0)  # files that are just written are not read twice
    monkeypatch.setattr(hash_cache, "sha256_file", lambda file: read.append(file.name) or sha256_file(file))
    check_files(folder, marker.files)
    assert len(read) == len(marker.files) == 3
    check_files(artifact_link(tmp_path / "here", *NAME), marker.files)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = artifact_folder(tmp_path / "there", *NAME, A)
    check_files(moved, marker.files)
    assert len(read) == 3 and set(read_json(moved / CHECKED)) == set(marker.files)
    left = {name: seal for name, seal in marker.files.items() if name != "notes.jsonl"}
    check_files(moved, left)
    assert len(read) == 3 and set(read_json(moved / CHECKED)) == set(left)


def test_a_changed_figure_in_a_marker_is_noticed(tmp_path: Path) -> None:
    path = _made(tmp_path, A) / MARKER
    path.write_text(path.read_text().replace("2.5", "2.4"))
    with pytest.raises(ArtifactError, match=r"done\.json: its content does not have the SHA-256"):
        read_marker(path.parent)


def test_a_changed_bit_that_reads_as_the_same_number_is_noticed_too(tmp_path: Path) -> None:
    path = _made(tmp_path, A) / MARKER
    path.write_text(path.read_text().replace('"loss": 2.5', '"loss": 2.50000000000000001'))
    with pytest.raises(ArtifactError, match=r"done\.json: its content does not have the SHA-256"):
        read_marker(path.parent)


def test_a_file_that_is_gone_makes_a_task_damaged(run: Run) -> None:
    run.finish("tokenizer")
    name = next(name for name in run.plan if name.stage == "tokenizer")
    folder = begin_artifact(run.root, *name, digest=run.plan[name].digest)
    (folder / "tokenizer.json").write_text("{}")
    finish_artifact(run.root, *name, Marker(run.plan[name].digest, Cost(1, 1, 1.0, 1.0, "cpu", 1), {}, {}))
    assert make_plan(run.pipeline, run.root)[name].state == "done"
    (folder / "tokenizer.json").unlink()
    planned = make_plan(run.pipeline, run.root)[name]
    assert planned.state == "damaged" and planned.is_to_do
    assert f"{name} is damaged: {folder}/tokenizer.json: No such file" in _says("results", "config.yaml")[1]


def _in_the_earlier_layout(root: Path, *keys: str) -> None:
    """Finished trainings as earlier versions left them, made from one of this version in the folder `new` beside it."""
    new = _made(root.with_name("new"), A)
    marker = {key: value for key, value in read_json(new / MARKER).items() if key not in ("files", "sha256", "apart")}
    (root / "slm/done").mkdir(parents=True)
    for key in keys:
        shutil.copytree(new, old := root / "slm" / key, symlinks=True)
        (old / MARKER).unlink()
        (old / LABEL).write_text(json.dumps({"digest": A, "incarnation": "1@there"}))
        (root / f"slm/done/{key}.json").write_text(json.dumps(marker))


def test_the_layout_of_earlier_versions_is_taken_over(tmp_path: Path) -> None:
    root = tmp_path / "old"
    _in_the_earlier_layout(root, "generic")
    adopt_earlier_layout(root)
    folder = artifact_folder(root, *NAME, A)
    assert read_marker(folder) == read_marker(artifact_link(tmp_path / "new", *NAME)) and artifact_link(
        root, *NAME
    ).samefile(folder)
    assert not (root / "slm/done").exists()
    adopt_earlier_layout(root)


def test_jobs_that_share_a_folder_take_its_earlier_layout_over_at_the_same_time(tmp_path: Path) -> None:
    root, keys = tmp_path / "old", [f"c{number}" for number in range(20)]
    _in_the_earlier_layout(root, *keys)
    together(lambda: adopt_earlier_layout(root))
    assert all(is_complete(root, "slm", key, digest=A) for key in keys) and not has_earlier_layout(root)


def test_what_an_earlier_version_has_made_again_since_is_not_declared_done(tmp_path: Path) -> None:
    root = tmp_path / "old"
    _in_the_earlier_layout(root, "generic")
    place, folder = root / "slm/generic", artifact_folder(root, "slm", "generic", A)
    folder.parent.mkdir(parents=True)
    place.rename(folder)  # a job of an earlier version was at work, which goes on in its own place
    place.mkdir()
    for content in (None, (folder / LABEL).read_bytes()):
        if content:
            (place / LABEL).write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{place}: a job of an earlier version has made it again"):
            adopt_earlier_layout(root)
        assert read_marker(folder) is None


def test_a_domain_named_done_is_no_marker_of_the_earlier_layout(tmp_path: Path) -> None:
    begin_artifact(tmp_path, "slm", "done", digest=A)
    finish_artifact(tmp_path, "slm", "done", Marker(A, Cost(1, 1, 1.0, 1.0, "cpu", 1), {}, {}))
    assert not has_earlier_layout(tmp_path)
    adopt_earlier_layout(tmp_path)
    assert is_complete(tmp_path, "slm", "done", digest=A)


def _says(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    error = f"error: {result.exception}" if isinstance(result.exception, SpecialmError) else ""
    return result.exit_code, result.output + error


def test_verify_names_what_is_damaged_and_what_nobody_lists(tmp_path: Path) -> None:
    root = tmp_path / "run"
    folder, other = _made(root, A), _made(root, B)
    for options in ([], ["--deep"]):
        code, said = _says("verify", str(root), *options)
        assert code == 0 and "2 artifacts (0 unfinished), 6 files" in said and "0 damaged" in said
    (folder / "step_0000001/model-00001.safetensors").touch()
    path = other / "step_0000001/model.bin"
    path.write_text("WEIGHTS")
    code, said = _says("verify", str(root))
    assert code == 0 and f"unlisted: {folder}/step_0000001/model-00001.safetensors" in said
    code, said = _says("verify", str(root), "--deep")
    assert code == 1 and f"damaged: {path}: SHA-256 is not what it was" in said and "1 damaged" in said
    path.unlink()
    assert f"damaged: {path}: No such file" in _says("verify", str(root))[1]
    assert "not a run folder" in _says("verify", str(tmp_path))[1]
    (folder / LABEL).unlink()
    assert f"damaged: {folder / LABEL}: no such file" in _says("verify", str(root))[1]


def test_verify_reads_the_checkpoints_of_what_is_not_finished(tmp_path: Path) -> None:
    folder = _made(tmp_path, A)
    (folder / MARKER).unlink()
    code, said = _says("verify", str(tmp_path), "--deep")
    assert code == 0 and "1 artifacts (1 unfinished)" in said and f"unfinished: {folder / MARKER}: not there" in said
    (folder / "step_0000001/model.bin").write_text("WEIGHTS")
    code, said = _says("verify", str(tmp_path), "--deep")
    assert code == 1 and "model.bin: SHA-256 differs" in said


def test_clean_lists_and_removes_on_demand_what_the_config_does_not_want(run: Run) -> None:
    write_resolved(run.pipeline, run.root)
    run.finish("tokenizer", "slm")
    kept = artifact_folder(run.root, *NAME, run.plan[TaskId(*NAME)].digest)
    old = _made(run.root, A)
    gone = begin_artifact(run.root, "of-an-earlier-config", "generic", digest=B)
    code, said = _says("clean", "config.yaml")
    assert code == 0 and "slm/generic" in said and "unfinished" in said and "--yes removes them" in said
    assert "2 artifacts" in said and old.exists() and gone.exists()
    assert "2 artifacts" in _says("clean", "config.yaml", "--yes")[1]
    assert not old.exists() and not (run.root / "of-an-earlier-config").exists() and kept.exists()
    assert {path.parent.parent.name for path in (run.root / "artifacts").glob("*/*/*")} == {"tokenizer", "slm"}
    assert "0 artifacts" in _says("clean", "config.yaml")[1]


def test_clean_leaves_what_a_job_makes(run: Run) -> None:
    write_resolved(run.pipeline, run.root)
    job = run.submit("7", "slm", keys=["generic"])
    begin_artifact(run.root, *NAME, digest=run.plan[TaskId(*NAME)].digest)
    run.slurm_says("7|0|RUNNING|0|UNLIMITED|node1|None|\n")
    assert "0 artifacts" in _says("clean", "config.yaml", "stages.slm.steps=9")[1]
    run.slurm_says("")
    assert "1 artifacts" in _says("clean", "config.yaml", "stages.slm.steps=9")[1] and job


def test_a_domain_named_done_and_a_stage_named_task_are_nobodys_earlier_layout(tmp_path: Path) -> None:
    folder = begin_artifact(tmp_path, "tokens", "done", digest=A)
    finish_artifact(tmp_path, "tokens", "done", Marker(A, Cost(1, 1, 1.0, 1.0, "cpu", 1), {}, {}))
    (tmp_path / "jobs/0001").mkdir(parents=True)
    (tmp_path / "jobs/0001/task.json").write_text("{}")
    refuse_earlier_layout(tmp_path)
    adopt_earlier_layout(tmp_path)
    assert read_marker(folder) is not None and artifact_link(tmp_path, "tokens", "done").samefile(folder)


def test_who_looks_at_an_earlier_layout_is_told(run: Run) -> None:
    (run.root / "slm/generic").mkdir(parents=True)
    (run.root / "slm/generic" / LABEL).write_text(json.dumps({"digest": A}))
    for looks in (lambda: make_plan(run.pipeline, run.root), lambda: verify(run.root, deep=False)):
        with pytest.raises(ArtifactError, match="an earlier version made it: the next `specialm run`"):
            looks()


def test_clean_is_of_the_folders_own_config(run: Run) -> None:
    write_resolved(run.pipeline.model_copy(update={"name": "another"}), run.root)
    _made(run.root, A)
    assert "holds the run of pipeline 'another'" in _says("clean", "config.yaml", "--yes")[1]
    assert artifact_folder(run.root, *NAME, A).exists()


def test_clean_leaves_what_jobs_will_read_and_does_not_guess(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write_resolved(run.pipeline, run.root)
    run.submit("7", "slm-tuned", keys=["torch"])
    slm = run.plan[TaskId(*NAME)]
    run.slurm_says("7|0|PENDING|0|UNLIMITED||Dependency|\n")
    begin_artifact(run.root, *NAME, digest=slm.digest, made_from=slm.made_from)
    tokens = run.plan[TaskId("tokens", "generic")]
    begin_artifact(run.root, "tokens", "generic", digest=tokens.digest, made_from=tokens.made_from)
    assert "0 artifacts" in _says("clean", "config.yaml", "seed=5")[1]
    run.slurm_says("")
    assert "2 artifacts" in _says("clean", "config.yaml", "seed=5")[1]
    (run.programs / "squeue").unlink()
    monkeypatch.setenv("PATH", str(run.programs))
    assert "no squeue to ask" in _says("clean", "config.yaml", "seed=5", "--yes")[1]


def test_results_make_no_run_folder(run: Run) -> None:
    code, said = _says("results", "config.yaml")
    assert code == 0 and "nothing has been evaluated yet" in said and not (run.root / "results.json").exists()
    write_resolved(run.pipeline, run.root)


def test_shards_are_checked_with_the_set_that_they_are_of(tmp_path: Path) -> None:
    shard = _finished(tmp_path, "tokens", "generic.00000", made := {"inputs": {}})
    whole = {"inputs": {"tokens/generic.00000": sha256_json(made)}}
    folder = _finished(tmp_path, "tokens", "generic", whole)
    tokens = TaskId("tokens", "generic")
    task, wanted = Task(TaskId(*NAME), (tokens,), {}, None), {"inputs": {"tokens/generic": sha256_json(whole)}}
    planned = PlannedTask(task, sha256_json(wanted), "to do", wanted)
    _begin(tmp_path, planned, {tokens: folder}, ALONE)
    (shard / "train.bin").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"generic\.00000/.*/train\.bin: SHA-256 is not what it was"):
        _begin(tmp_path, planned, {tokens: folder}, ALONE)


def _finished(root: Path, stage: str, key: str, made_from: dict) -> Path:
    digest = sha256_json(made_from)
    folder = begin_artifact(root, stage, key, digest=digest, made_from=made_from)
    (folder / "train.bin").write_bytes(b"token")
    finish_artifact(root, stage, key, Marker(digest, Cost(1, 1, 1.0, 1.0, "cpu", 1), {}, {}))
    return folder
