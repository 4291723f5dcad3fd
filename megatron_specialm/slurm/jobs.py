"""The tasks that a submit queues, and the jobs that do them: one array per stage, and where tasks of a stage read others of it,
one per wave of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.site import Launcher, Resources, Site
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm.records import TaskRecord
from megatron_specialm.slurm.sbatch import JobSize, job_size
from megatron_specialm.slurm.state import OTHERWISE, Live


@dataclass(frozen=True)
class Job:
    """A job to submit. Each element does its tasks one after the other; `inputs` are those of all its tasks."""

    name: str
    stage: str
    elements: tuple[tuple[TaskRecord, ...], ...]
    made_from: Mapping[str, Mapping[str, Any]]  # by the key of each task: what its digest is of
    inputs: frozenset[TaskId]
    size: JobSize
    resources: Resources
    launcher: Launcher

    def element_of(self, task: TaskId) -> int | None:
        """The number of the element that does a task, if one does."""
        for number, element in enumerate(self.elements):
            if task.stage == self.stage and task.key in {record.key for record in element}:
                return number
        return None


def missing_tasks(
    plan: Mapping[TaskId, PlannedTask], chosen: Mapping[TaskId, PlannedTask], live: Mapping[TaskId, Live]
) -> dict[TaskId, PlannedTask]:
    """The chosen tasks that are neither done nor in a live job, in the graph's order.

    Raises:
        ConfigError: a live job does one of the tasks, or makes what they read, from other settings or text.
        ArtifactError: a task reads what is neither done, nor in a live job, nor chosen.
    """
    missing = {name: planned for name, planned in chosen.items() if planned.state != "done" and name not in live}
    read = {needed for planned in missing.values() for needed in planned.task.inputs}
    for name, job in live.items():
        if name not in plan or job.digest == plan[name].digest:
            continue
        if name in chosen or name in read:
            raise ConfigError(f"{name}: job {job.slurm_id} {OTHERWISE}: let it end, or `specialm cancel` it")
    for name, planned in missing.items():
        for needed in planned.task.inputs:
            if plan[needed].state != "done" and needed not in live and needed not in missing:
                raise ArtifactError(
                    f"{name} reads {needed}, which is {plan[needed].state} and in no job: submit --until {name.stage}"
                )
    return missing


def jobs_of(pipeline: Pipeline, site: Site, missing: Mapping[TaskId, PlannedTask]) -> list[Job]:
    """The jobs, each after those whose results it reads.

    Args:
        missing: in the graph's order.

    Raises:
        ConfigError: a training's processes cannot be spread evenly over nodes.
    """
    waves: dict[tuple[str, int], list[PlannedTask]] = {}
    wave_of: dict[TaskId, int] = {}
    for name, planned in missing.items():
        before = [wave_of[other] for other in planned.task.inputs if other.stage == name.stage and other in wave_of]
        wave_of[name] = 1 + max(before, default=-1)
        waves.setdefault((name.stage, wave_of[name]), []).append(planned)
    return [_job(pipeline, site, stage, wave, tasks) for (stage, wave), tasks in waves.items()]


def _job(pipeline: Pipeline, site: Site, stage: str, wave: int, tasks: Sequence[PlannedTask]) -> Job:
    settings = pipeline.stages[stage]
    kind = kind_of(settings)
    processes = kind.ranks(settings, mpi=True)
    resources = site.resources(stage, kind.kind)
    found = [TaskRecord(planned.task.id.key, planned.digest) for planned in tasks]
    size = resources.tasks_per_job
    return Job(
        name=f"{stage}.{wave}" if wave else stage,
        stage=stage,
        elements=tuple(tuple(found[start : start + size]) for start in range(0, len(found), size)),
        made_from={planned.task.id.key: planned.made_from for planned in tasks},
        inputs=frozenset(name for planned in tasks for name in planned.task.inputs),
        size=job_size(processes, resources, stage=stage),
        resources=resources,
        # One rank needs no launcher.
        launcher="srun" if processes == 1 else "mpi" if kind.ranks_by == "mpi" else site.launcher,
    )
