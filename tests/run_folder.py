"""A run folder of the smoke config, made by the functions that make real ones; Slurm's commands print what they are told."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_specialm.base.artifacts import Cost, Marker, begin_artifact, finish_artifact
from megatron_specialm.base.files import write_json
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.plan import PlannedTask, make_plan
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm.records import (
    AttemptBegin,
    AttemptEnd,
    JobRecord,
    Outcome,
    TaskRecord,
    job_path,
    read_registry,
    record_begin,
    record_end,
    state_folder,
    submission_folder,
    write_registry,
)
from megatron_specialm.slurm.status import Status, read_status
from megatron_specialm.slurm.status_view import state_text
from megatron_specialm.train.metrics import Metrics

SMOKE = configs_folder() / "pipelines" / "smoke.yaml"
DOMAINS = ("scipy", "sklearn", "torch")


@dataclass
class Run:
    """A run folder of the smoke config, and Slurm as far as its commands are asked."""

    pipeline: Pipeline
    root: Path
    programs: Path
    plan: dict[TaskId, PlannedTask]

    def finish(self, *stages: str) -> None:
        """Declare stages done."""
        for name, planned in self.plan.items():
            if name.stage in stages:
                begin_artifact(self.root, *name, digest=planned.digest, made_from=planned.made_from)
                finish_artifact(self.root, *name, Marker(planned.digest, Cost(1, 1, 36.0, 36.0, "cpu", 1), {}, {}))

    def submit(self, slurm_id: str | None, stage: str, *, keys: Sequence[str] = DOMAINS, ranks: int = 1) -> JobRecord:
        """Register a job with an element per key."""
        elements = tuple((TaskRecord(key, self.plan[TaskId(stage, key)].digest),) for key in keys)
        job = JobRecord("0001", stage, stage, slurm_id, f"specialm-{stage}", elements, (), time.time(), ranks)
        write_registry(self.root, [*read_registry(self.root), job])
        submission_folder(self.root, "0001").mkdir(exist_ok=True)
        tasks = {key: self.plan[TaskId(stage, key)] for key in keys}
        told = [[{"key": key, "digest": task.digest, "made_from": task.made_from}] for key, task in tasks.items()]
        write_json(job_path(self.root, "0001", stage), {"stage": stage, "elements": told})
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
        metrics.write(
            step=step, steps=400, loss=loss, tokens_per_second=12345.6, eta_seconds=3725.4, mfu=None, fill=0.97
        )
        metrics.close()

    def slurm_says(self, squeue: str) -> None:
        """What squeue prints from now on."""
        (self.programs / "squeue.txt").write_text(squeue)

    def status(self) -> Status:
        return read_status(self.pipeline)

    def text(self, stage: str) -> str:
        return next(state_text(found) for found in self.status().stages if found.stage == stage)


def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Nothing is done and nothing submitted yet; `config.yaml` in the working directory is the config."""
    monkeypatch.chdir(tmp_path)
    pipeline = load_pipeline(SMOKE)
    for files in (pipeline.text.generic, *pipeline.text.domains.values()):
        for entry in (*files.train, *files.validation, *files.test):
            Path(entry).parent.mkdir(parents=True, exist_ok=True)
            Path(entry).write_text(json.dumps({"text": entry}) + "\n")
    Path("config.yaml").write_text(f"extends: {SMOKE}\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    end = f'for id; do sed -i -E "s/^($id[|][0-9]+[|])(RUNNING|PENDING)/\\1CANCELLED/" {programs}/squeue.txt; done'
    wanted = 'for word; do case "$word" in --jobs=*) ids=$(echo "${word#--jobs=}" | tr , "|");; esac; done'
    found = f'grep -E "^(${{ids:-.*}})[|]" {programs}/squeue.txt || true'
    stand_ins = {"squeue": f"{wanted}\n{found}", "scancel": f'echo "$@" >> {programs}/cancelled\n{end}'}
    for name, body in stand_ins.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    root = Path(pipeline.root)
    return Run(pipeline, root, programs, make_plan(pipeline, root))
