"""From a plan to jobs: what is missing, in which arrays, behind whom, and from which frozen inputs."""

import os
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_specialm.base.errors import ArtifactError, ConfigError, MachineError
from megatron_specialm.base.files import read_json
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.site import Site, load_site
from megatron_specialm.graph.plan import PlannedTask, make_plan
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm import submit as submitting
from megatron_specialm.slurm.jobs import Job, jobs_of, missing_tasks
from megatron_specialm.slurm.nodes import exclude_node
from megatron_specialm.slurm.records import JobRecord, TaskRecord, excluded_folder, read_registry, write_registry
from megatron_specialm.slurm.state import Live, live_tasks
from megatron_specialm.slurm.submission import Submission
from megatron_specialm.slurm.submit import dependencies, preview, submit
from tests.texts import write_smoke_names

ROOT = Path(__file__).parents[2]
SMOKE = configs_folder() / "pipelines" / "smoke.yaml"
TEMPLATE = ROOT / "slurm" / "stage.sbatch.template"
Plan = Mapping[TaskId, PlannedTask]


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """The smoke config, in a working directory with its files."""
    monkeypatch.chdir(tmp_path)
    write_smoke_names(tmp_path)
    return load_pipeline(SMOKE, [f"root={tmp_path / 'run'}"])


@pytest.fixture
def plan(pipeline: Pipeline) -> Plan:
    return make_plan(pipeline, Path(pipeline.root))


def _jobs(pipeline: Pipeline, missing: Plan, **site: object) -> dict[str, Job]:
    return {job.name: job for job in jobs_of(pipeline, Site.model_validate(site), missing)}


def _keys(job: Job) -> list[list[str]]:
    return [[task.key for task in element] for element in job.elements]


# --- missing ----------------------------------------------------------------------------------------------------------


def test_what_is_done_or_on_its_way_is_not_missing(plan: Plan) -> None:
    assert missing_tasks(plan, plan, {}) == plan
    done, going = TaskId("tokenizer", "generic"), TaskId("tokens", "torch")
    plan = {**plan, done: replace(plan[done], state="done")}
    live = {going: Live("12_3", plan[going].digest)}
    assert set(plan) - set(missing_tasks(plan, plan, live)) == {done, going}
    stale = {**plan, done: replace(plan[done], state="stale")}
    assert done in missing_tasks(stale, stale, live)
    assert live_tasks([]) == {}, "Slurm is not asked about nothing"


def test_a_live_job_for_other_settings_is_in_the_way(plan: Plan) -> None:
    name = TaskId("tokens", "torch")
    old = {name: Live("12_3", "another")}
    with pytest.raises(ConfigError, match=r"tokens/torch: job 12_3 makes it from other .*specialm cancel"):
        missing_tasks(plan, plan, old)
    reader = TaskId("slm-nopt", "torch")
    with pytest.raises(ConfigError, match=r"tokens/torch: job 12_3 makes it from other"):
        missing_tasks(plan, {reader: plan[reader]}, old)
    tokens = {other: planned for other, planned in plan.items() if other.stage == "tokens" and other != name}
    done = {**plan, TaskId("tokenizer", "generic"): replace(plan[TaskId("tokenizer", "generic")], state="done")}
    assert missing_tasks(done, tokens, old) == tokens, "nobody here reads it"
    gone = {TaskId("removed", "generic"): Live("12_3", "another")}
    assert missing_tasks(plan, plan, gone) == plan


def test_a_live_job_keeps_what_it_reads_while_that_is_made_anew(plan: Plan) -> None:
    reader = TaskId("slm-nopt", "torch")
    chosen = {name: planned for name, planned in plan.items() if name.stage in ("tokenizer", "tokens")}
    for digest in ("another", plan[reader].digest):
        assert missing_tasks(plan, chosen, {reader: Live("12_3", digest)}) == chosen


@pytest.mark.parametrize("state", ["to do", "stale"])
def test_inputs_must_be_there_or_come(plan: Plan, state: str) -> None:
    needed = TaskId("tokenizer", "generic")
    chosen = {name: planned for name, planned in plan.items() if name.stage == "tokens"}
    plan = {**plan, needed: replace(plan[needed], state=state)}  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=rf"tokens/\w+ reads tokenizer/generic, which is {state} .*--until tokens"):
        missing_tasks(plan, chosen, {})
    assert missing_tasks(plan, chosen, {needed: Live("12_0", plan[needed].digest)}) == chosen
    assert missing_tasks({**plan, needed: replace(plan[needed], state="done")}, chosen, {}) == chosen


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_each_stage_is_an_array_and_those_that_read_their_own_stage_two(pipeline: Pipeline, plan: Plan) -> None:
    jobs = _jobs(pipeline, plan)
    assert _keys(jobs["tokens"]) == [["generic"], ["scipy"], ["sklearn"], ["torch"]]
    assert _keys(jobs["vectors"]) == [["generic.encoder"]], "the others read it"
    assert _keys(jobs["vectors.1"]) == [["generic"], ["scipy"], ["sklearn"], ["torch"]]
    assert jobs["vectors.1"].stage == "vectors" and TaskId("vectors", "generic.encoder") in jobs["vectors.1"].inputs
    assert sum(len(job.elements) for job in jobs.values()) == len(plan)
    before: set[TaskId] = set()
    for job in jobs.values():
        assert job.inputs <= before, f"{job.name} stands before what it reads"
        before |= {TaskId(job.stage, task.key) for element in job.elements for task in element}


def test_a_wave_is_counted_from_what_is_missing(pipeline: Pipeline, plan: Plan) -> None:
    missing = {name: planned for name, planned in plan.items() if name != TaskId("vectors", "generic.encoder")}
    jobs = _jobs(pipeline, missing)
    assert "vectors.1" not in jobs and len(jobs["vectors"].elements) == 4


def test_k_means_on_several_processes_adds_over_mpi(pipeline: Pipeline) -> None:
    pipeline = load_pipeline(SMOKE, [f"root={pipeline.root}", "stages.clusters.processes=4"])
    jobs = _jobs(pipeline, make_plan(pipeline, Path(pipeline.root)), launcher="torchrun")
    assert (jobs["clusters"].launcher, jobs["clusters"].size.ranks) == ("mpi", 4)
    assert (jobs["clusters-4"].launcher, jobs["clusters-4"].size.ranks) == ("srun", 1), "one rank needs no launcher"


def test_short_tasks_share_an_element(pipeline: Pipeline, plan: Plan) -> None:
    job = _jobs(pipeline, plan, jobs={"tokenize": {"tasks_per_job": 3}})["tokens"]
    assert _keys(job) == [["generic", "scipy", "sklearn"], ["torch"]]
    assert job.elements[1][0] == TaskRecord("torch", plan[TaskId("tokens", "torch")].digest)
    assert [job.element_of(TaskId("tokens", key)) for key in ("generic", "sklearn", "torch")] == [0, 0, 1]
    assert job.element_of(TaskId("tokens", "none")) is None and job.element_of(TaskId("tokenizer", "generic")) is None


def test_a_trainings_ranks_and_resources(pipeline: Pipeline) -> None:
    name = next(name for name, stage in pipeline.stages.items() if stage.kind == "train")
    pipeline = load_pipeline(
        SMOKE, [f"root={pipeline.root}", f"stages.{name}.parallel.data_parallel=4", f"stages.{name}.micro_batch_size=1"]
    )
    plan = make_plan(pipeline, Path(pipeline.root))
    jobs = _jobs(pipeline, plan, launcher="torchrun", jobs={"train": {"processes_per_node": 2, "time": "1-00"}})
    assert (jobs[name].size.ranks, jobs[name].size.nodes, jobs[name].resources.time) == (4, 2, "1-00")
    assert (jobs[name].launcher, jobs["tokens"].size.ranks) == ("torchrun", 1)
    with pytest.raises(ConfigError, match=f"stages.{name}.parallel: 4 processes"):
        _jobs(pipeline, plan, jobs={name: {"processes_per_node": 3}})


# --- dependencies -----------------------------------------------------------------------------------------------------


def _record(job: Job, slurm_id: str) -> JobRecord:
    return JobRecord("0001", job.name, job.stage, slurm_id, "c", job.elements, (), 0.0, 1)


def test_whole_arrays_where_all_is_read_elements_otherwise(pipeline: Pipeline, plan: Plan) -> None:
    jobs = _jobs(pipeline, plan, jobs={"tokenize": {"tasks_per_job": 2}})
    tokens = jobs["tokens"]
    queued = [(jobs["tokenizer"], _record(jobs["tokenizer"], "10")), (tokens, _record(tokens, "11"))]

    def after(*names: str) -> list[str]:
        inputs = frozenset(TaskId(*name.split("/")) for name in names)
        return dependencies(replace(tokens, name="x", stage="x", inputs=inputs), queued, {})

    assert after("tokenizer/generic") == ["10"]
    assert after("tokens/torch") == ["11_1"]
    assert after("tokens/generic", "tokens/scipy") == ["11_0"]
    assert after("tokens/scipy", "tokens/torch", "tokenizer/generic") == ["10", "11"]
    assert after("elsewhere/done") == []


def test_live_elements_are_waited_for_one_by_one(pipeline: Pipeline, plan: Plan) -> None:
    job = _jobs(pipeline, plan)["tokens"]
    assert dependencies(job, [], {TaskId("tokenizer", "generic"): Live("7_0", "d")}) == ["7_0"]
    assert dependencies(job, [], {TaskId("tokens", "torch"): Live("7_0", "d")}) == [], "it does not read that"


# --- submissions ------------------------------------------------------------------------------------------------------


def _submission(pipeline: Pipeline, *known: JobRecord, **site: object) -> Submission:
    return Submission.next(pipeline, Site.model_validate(site), TEMPLATE, Path(pipeline.root), known)


def test_a_preview_writes_nothing_and_names_jobs_for_ids(pipeline: Pipeline, plan: Plan, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    shown = list(preview(_submission(pipeline), jobs_of(pipeline, Site(), plan), live={}))
    assert sorted(tmp_path.rglob("*")) == before
    scripts = {job.name: script for job, script in shown}
    assert (
        "#SBATCH --array=0-3%16\n" in scripts["tokens"]
        and "#SBATCH --dependency=afterok:<tokenizer>\n" in scripts["tokens"]
    )
    assert "--dependency" not in scripts["tokenizer"] and "--kill-on-invalid-dep" not in scripts["tokenizer"]
    for script in scripts.values():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=60)


def test_nodes_that_failed_are_left_out(pipeline: Pipeline, plan: Plan) -> None:
    exclude_node(excluded_folder(Path(pipeline.root)), "node7", reason="slow")
    _, script = next(iter(preview(_submission(pipeline, exclude=["node1"]), jobs_of(pipeline, Site(), plan), live={})))
    assert "#SBATCH --exclude=node1,node7\n" in script


def test_numbers_are_never_used_again(pipeline: Pipeline, plan: Plan) -> None:
    job = _jobs(pipeline, plan)["tokens"]
    assert _submission(pipeline).number == "0001"
    assert _submission(pipeline, replace(_record(job, "5"), submission="0009")).number == "0010"
    (Path(pipeline.root) / "jobs" / "0012" / "tokens.0" / "attempt-0").mkdir(parents=True)
    assert _submission(pipeline, replace(_record(job, "5"), submission="0009")).number == "0013"


@pytest.mark.parametrize("character", ["%", "\\", "\n", ":"])
def test_a_root_that_slurm_or_python_would_misread(pipeline: Pipeline, tmp_path: Path, character: str) -> None:
    with pytest.raises(ConfigError, match="choose another root"):
        Submission.next(pipeline, Site(), TEMPLATE, tmp_path / f"a{character}b", [])


def test_what_is_frozen_is_what_jobs_run_from(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(pipeline.root).parent)
    relative = pipeline.model_copy(update={"root": "run"})
    submission = Submission.next(
        relative, Site.model_validate({"jobs": {"train": {"time": "9"}}}), TEMPLATE, Path("run"), []
    )
    submission.freeze()
    home = Path(pipeline.root) / "jobs" / "0001"
    assert load_pipeline(home / "pipeline.yaml") == pipeline, "with a root that holds from anywhere"
    assert load_site(home / "site.yaml") == submission.site
    assert stat.S_IMODE((home / "site.yaml").stat().st_mode) == 0o600, "its environment may hold a token"
    told = read_json(home / "submission.json")
    assert told["folder"] == str(Path.cwd()) and told["code"]["sha256"] == submission.code.sha256
    assert yaml.safe_load((home / "pipeline.yaml").read_text())["root"] == pipeline.root


# --- sbatch -----------------------------------------------------------------------------------------------------------


def _sbatch(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sbatch of our own on PATH. (The real one is in tests/cluster.)"""
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/usr/bin/env bash\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def test_ids_are_on_record_and_stand_in_the_next_script(
    pipeline: Pipeline, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(
        tmp_path, f"echo x >> {tmp_path}/calls; echo 'Welcome!'; echo \"$(wc -l < {tmp_path}/calls);east\"", monkeypatch
    )
    jobs = jobs_of(pipeline, Site(), plan)
    found = submit(_submission(pipeline), jobs, known=[], live={})
    assert [record.slurm_id for record in found] == [str(1 + number) for number in range(len(jobs))]
    assert read_registry(Path(pipeline.root)) == found
    home = Path(pipeline.root) / "jobs" / "0001"
    assert "--dependency=afterok:1\n" in (home / "tokens.sbatch").read_text()
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.glob("*.sbatch")} == {0o600}
    assert read_json(home / "tokens.json")["elements"][3] == [
        {"key": "torch", "digest": (wanted := plan[TaskId("tokens", "torch")]).digest, "made_from": wanted.made_from}
    ]
    assert len({record.comment for record in found}) == len(found)


def _squeue(folder: Path, body: str) -> None:
    """A squeue that prints `id|comment` lines; `$(comment)` is that of the script which sbatch was given last."""
    program = folder / "bin" / "squeue"
    comment = f"comment() {{ grep -o 'specialm-[0-9a-f]*' {folder}/run/jobs/*/$(cat {folder}/last) | head -1; }}"
    program.write_text(f"#!/bin/bash\n{comment}\n{body}\n")
    program.chmod(0o755)


def test_a_refusal_leaves_those_before_it_on_record(
    pipeline: Pipeline, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(
        tmp_path, '[ "$2" != tokens.sbatch ] || { echo "error: no such account" >&2; exit 1; }; echo 41', monkeypatch
    )
    _squeue(tmp_path, "echo '41|another'")
    jobs = jobs_of(pipeline, Site(), plan)
    with pytest.raises(MachineError, match=r"tokens\.sbatch: error: no such account"):
        submit(_submission(pipeline), jobs, known=[], live={})
    on_record = read_registry(Path(pipeline.root))
    assert [(record.name, record.slurm_id) for record in on_record] == [("tokenizer", "41")]
    assert (Path(pipeline.root) / "jobs" / "0001" / "tokenizer.sbatch").exists()


@pytest.mark.parametrize("fault", ["refused", "no sbatch", "bad template"])
def test_a_submit_that_queues_nothing_leaves_nothing(
    pipeline: Pipeline, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    _sbatch(tmp_path, "exit 1", monkeypatch)
    _squeue(tmp_path, "true")
    submission = _submission(pipeline)
    if fault == "no sbatch":
        (tmp_path / "bin" / "sbatch").unlink()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if fault == "bad template":
        submission = replace(submission, template=tmp_path / "none")
    with pytest.raises((MachineError, ConfigError)):
        submit(submission, jobs_of(pipeline, Site(), plan), known=[], live={})
    assert not (Path(pipeline.root) / "jobs").exists()


def test_a_job_that_slurm_refuses_for_lack_of_nodes_names_those_that_are_excluded(
    pipeline: Pipeline, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, "echo 'sbatch: error: Requested node configuration is not available' >&2; exit 1", monkeypatch)
    _squeue(tmp_path, "true")
    exclude_node(excluded_folder(Path(pipeline.root)), "node7", reason="slow")
    with pytest.raises(
        MachineError, match=r"is not available: .*excluded/nodes\.json excludes node7: remove those that"
    ):
        submit(_submission(pipeline), jobs_of(pipeline, Site(), plan), known=[], live={})


@pytest.mark.parametrize(
    "answer",
    [
        'echo "Submitted batch job 41 on cluster big"',
        "echo 41; echo 'Your project has 300 hours left'",
        "printf 'Budget:\n300\n41\n'",  # two numbers alone in a line: Slurm decides
        "echo 'dear user'",
        "printf '\377 ok\n'",  # not UTF-8
        "echo 'slurm_load_jobs error: Socket timed out' >&2; exit 1",  # queued, and then it failed
        "sleep 60",  # queued, and then it hung
    ],
)
def test_what_slurm_has_got_is_queued_whatever_sbatch_says(
    pipeline: Pipeline, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(submitting, "SBATCH_SECONDS", 2)
    _sbatch(tmp_path, f'echo "$2" > {tmp_path}/last; {answer}', monkeypatch)
    _squeue(tmp_path, 'echo "41|$(comment)"')
    jobs = jobs_of(pipeline, Site(), plan)[:1]
    found = submit(_submission(pipeline), jobs, known=[], live={})
    assert [record.slurm_id for record in found] == ["41"]
    assert submitting.recover(Path(pipeline.root)) == found, "a second submit knows of it"


def test_where_slurm_cannot_be_asked_the_job_stays_on_record(
    pipeline: Pipeline, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, f"echo \"$2\" > {tmp_path}/last; echo 'dear user'", monkeypatch)
    _squeue(tmp_path, "echo 'Access denied' >&2; exit 1")
    with pytest.raises(MachineError, match=r"'dear user'.*Access denied.*specialm-\w+, and queues nothing twice"):
        submit(_submission(pipeline), jobs_of(pipeline, Site(), plan)[:1], known=[], live={})
    _squeue(tmp_path, 'echo "41|$(comment)"')
    assert [record.slurm_id for record in submitting.recover(Path(pipeline.root))] == ["41"]


def test_a_user_without_a_name_is_recorded_by_number(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[f"getpwuid(): uid not found: {uid}"])
    _submission(pipeline).freeze()
    record = read_json(Path(pipeline.root) / "jobs" / "0001" / "submission.json")
    assert record["user"] == f"uid {os.getuid()}"


def test_what_is_set_around_a_submit_does_not_reach_the_job(
    pipeline: Pipeline, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, f"env > {tmp_path}/given; echo 1", monkeypatch)
    for name in (
        "SLURM_JOB_ID",
        "SBATCH_WAIT",
        "SBATCH_TIMELIMIT",
        "RANK",
        "WORLD_SIZE",
        "SPECIALM_HEARTBEAT",
        "OMPI_X",
    ):
        monkeypatch.setenv(name, "set around")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("MY_TOKEN", "kept")
    submit(_submission(pipeline), jobs_of(pipeline, Site(), plan)[:1], known=[], live={})
    given = (tmp_path / "given").read_text()
    assert "set around" not in given and "SLURM_CONF=/etc/slurm.conf" in given and "MY_TOKEN=kept" in given


def test_a_registry_without_gaps_needs_no_slurm(
    pipeline: Pipeline, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    record = _record(_jobs(pipeline, plan)["tokens"], "5")
    write_registry(Path(pipeline.root), [record])
    assert submitting.recover(Path(pipeline.root)) == [record]
    write_registry(Path(pipeline.root), [record, replace(record, slurm_id=None)])
    with pytest.raises(MachineError, match="squeue: not found"):
        submitting.recover(Path(pipeline.root))


def test_a_container_shows_the_run_folder_and_the_working_directory(pipeline: Pipeline, tmp_path: Path) -> None:
    here = f"{tmp_path}:{tmp_path}"
    container = {"runtime": "pyxis", "image": "a", "mounts": ["/data:/data", here]}
    submission = _submission(pipeline, container=container)
    submission.freeze()
    frozen = load_site(Path(pipeline.root) / "jobs" / "0001" / "site.yaml")
    assert frozen.container is not None
    assert frozen.container.mounts == ["/data:/data", here, f"{pipeline.root}:{pipeline.root}"]
