"""Missing tasks as jobs: one array per stage, and where tasks of a stage read others of it, one per wave of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.site import Launcher, Resources, Site
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm.records import TaskRecord
from megatron_specialm.slurm.sbatch import Shape, shape_of


@dataclass(frozen=True)
class Job:
    """A job to submit. Each element does its tasks one after the other; `inputs` are read by any of them."""

    name: str
    stage: str
    elements: tuple[tuple[TaskRecord, ...], ...]
    made_from: Mapping[str, Mapping[str, Any]]  # of each task, by its key: what its digest is of
    inputs: frozenset[TaskId]
    shape: Shape
    resources: Resources
    launcher: Launcher

    def element_of(self, task: TaskId) -> int | None:
        """The number of the element that does a task; None where none does."""
        for number, element in enumerate(self.elements):
            if task.stage == self.stage and task.key in {record.key for record in element}:
                return number
        return None


def jobs_of(pipeline: Pipeline, site: Site, missing: Mapping[TaskId, PlannedTask]) -> list[Job]:
    """The jobs in an order in which each stands behind those whose work it reads.

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
        shape=shape_of(processes, resources, stage=stage),
        resources=resources,
        # One rank needs no launcher of its own.
        launcher="srun" if processes == 1 else "mpi" if kind.ranks_by == "mpi" else site.launcher,
    )
