"""What is neither done nor on its way: what a submit is to queue."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.errors import ArtifactError, ConfigError, MachineError
from megatron_specialm.graph.earlier_layout import adopt_earlier_layout, has_earlier_layout
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm import records
from megatron_specialm.slurm.queue import live_elements
from megatron_specialm.slurm.records import JobRecord

OTHERWISE = "makes it from other settings or text"


@dataclass(frozen=True)
class Live:
    """The element of a queued or running job that does a task, as Slurm names it (123_0), and for which digest."""

    slurm_id: str
    digest: str


def live_tasks(jobs: Iterable[JobRecord]) -> dict[TaskId, Live]:
    """The tasks that queued and running jobs do.

    Raises:
        MachineError: Slurm does not answer.
    """
    submitted = [job for job in jobs if job.slurm_id is not None]
    alive = live_elements([str(job.slurm_id) for job in submitted])
    return {
        TaskId(job.stage, task.key): Live(f"{job.slurm_id}_{number}", task.digest)
        for job in submitted
        for number, element in enumerate(job.elements)
        if (job.slurm_id, number) in alive
        for task in element
    }


def used_by_jobs(root: Path, jobs: Iterable[JobRecord]) -> set[str]:
    """The digests of what queued and running jobs make and read, as their job files say.

    Raises:
        MachineError: Slurm does not answer.
        ArtifactError: a job file is damaged.
    """
    submitted = [job for job in jobs if job.slurm_id is not None]
    alive = live_elements([str(job.slurm_id) for job in submitted])
    used: set[str] = set()
    for job in submitted:
        if any((job.slurm_id, number) in alive for number in range(len(job.elements))):
            elements = records.read_job_file(records.job_path(root, job.submission, job.name)).elements
            for task in (task for element in elements for task in element):
                used |= {task.digest, *task.made_from.get("inputs", {}).values()}
    return used


def adopt_unattended(root: Path) -> None:
    """Take over the layout of earlier versions, where there is any and no job works by it.

    Raises:
        MachineError: a job is queued or running, or Slurm does not answer.
        ArtifactError: what there is is damaged, or such a job has worked in the folder since.
    """
    if not has_earlier_layout(root):
        return
    for name, job in _live_where_known(root).items():
        raise MachineError(
            f"{root}: an earlier version made this folder, and job {job.slurm_id}, for {name}, may still run it: what is there "
            "is moved when no job is left: let them end, or `specialm cancel` them"
        )
    adopt_earlier_layout(root)


def _live_where_known(root: Path) -> dict[TaskId, Live]:
    """What jobs of a run folder do, as far as this machine can ask Slurm."""
    jobs = records.read_registry(root)
    return live_tasks(jobs) if jobs and shutil.which("squeue") else {}


def refuse_live(root: Path, plan: Mapping[TaskId, PlannedTask]) -> None:
    """Before what a plan lacks is done here: that no job of the run folder does one of these tasks, from whatever settings, as
    it holds the task. A machine without Slurm cannot know.

    Raises:
        MachineError: one does, or Slurm does not answer.
    """
    live = _live_where_known(root)
    for name, planned in plan.items():
        if planned.state != "done" and name in live:
            does = "does it" if live[name].digest == planned.digest else OTHERWISE
            raise MachineError(f"{name}: job {live[name].slurm_id} {does}: let it end, or `specialm cancel` it")


def missing_tasks(
    plan: Mapping[TaskId, PlannedTask], chosen: Mapping[TaskId, PlannedTask], live: Mapping[TaskId, Live]
) -> dict[TaskId, PlannedTask]:
    """The chosen tasks that are to be queued, or taken over before, in the graph's order.

    Raises:
        ConfigError: a job that is queued or running does one of the tasks, or what they read, from other settings or text.
        ArtifactError: a task reads what is neither done, nor on its way, nor chosen.
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
