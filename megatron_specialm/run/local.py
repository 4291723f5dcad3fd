"""Run a plan on this machine: as many tasks at a time as there are cores for, or GPUs where there are any, each in worker
processes of its own (`processes.py`).

A task starts when its inputs are done. When one fails, tasks that do not depend on it continue; the failures are reported
together at the end. Workers end with the launcher, however it ends, and share its lock of the run folder until then.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path

from megatron_specialm.base.accelerator import visible_gpus
from megatron_specialm.base.artifacts import artifact_folder, is_complete
from megatron_specialm.base.environment import World, usable_cores
from megatron_specialm.base.errors import SpecialmError
from megatron_specialm.base.lock import HeldFolder
from megatron_specialm.base.printing import say
from megatron_specialm.base.process_status import ending_as_by_ctrl_c
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.base.temporary import short_place
from megatron_specialm.config.load import KINDS
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.plan import PlannedTask, link_artifacts
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.processes import Workers, end_workers, log_path, worker_context
from megatron_specialm.run.progress import TaskProgress
from megatron_specialm.run.reuse import take_over
from megatron_specialm.run.worker import work

POLL_SECONDS = 0.2


class TaskFailure(SpecialmError):
    """One or more tasks ended with an error."""

    exit_code = 1


class Interrupted(SpecialmError):
    """Ctrl-C or SIGTERM ended the run."""

    exit_code = 130


@dataclass
class _Running:
    """A task that is being done, and the GPUs that its workers see."""

    planned: PlannedTask
    workers: Workers
    gpus: Sequence[str] = ()
    watch: Stopwatch = field(default_factory=Stopwatch)


def run_local(
    pipeline: Pipeline,
    plan: Mapping[TaskId, PlannedTask],
    root: Path,
    *,
    held: HeldFolder,
    jobs: int | None,
    progress: TaskProgress,
) -> None:
    """Take over artifacts of other run folders, and do the missing tasks.

    Args:
        held: the lock of `root`, which the workers share.

    Raises:
        TaskFailure: with each failed task's error and log.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; the workers have been ended.
    """
    (root / "jobs").mkdir(parents=True, exist_ok=True)
    gpus = visible_gpus()  # by default a task on each: two trainings would rarely fit on one
    slots = jobs or pipeline.local.parallel_tasks or len(gpus) or max(1, usable_cores() // pipeline.local.threads)
    waiting = {name: planned for name, planned in plan.items() if planned.is_to_do}
    running: dict[TaskId, _Running] = {}
    failures: dict[TaskId, str] = {}
    context = worker_context([f"megatron_specialm.stages.{kind}" for kind in KINDS], threads=pipeline.local.threads)
    with ending_as_by_ctrl_c(), tempfile.TemporaryDirectory(dir=short_place()) as folder:
        try:
            take_over(plan, root)
            link_artifacts(plan, root)
            while waiting or running:
                for name in _startable(pipeline, waiting, running, failures, slots):
                    own = least_used(gpus, (task.gpus for task in running.values()), count=_ranks(pipeline, name))
                    running[name] = _start(context, pipeline, waiting.pop(name), root, held, Path(folder), own)
                    progress.started(name)
                if not running:
                    break  # all that is left depends on a failed task
                time.sleep(POLL_SECONDS)
                for name in [name for name, task in running.items() if task.workers.have_ended()]:
                    task = running.pop(name)
                    error = _error_of(root, task)
                    progress.finished(name, seconds=task.watch.seconds, error=error)
                    if error:
                        failures[name] = error
                progress.update(
                    {name: artifact_folder(root, *name, task.planned.digest) for name, task in running.items()}
                )
        except KeyboardInterrupt:
            if running:
                say("interrupted: waiting until trainings have saved; Ctrl-C ends them without", error=True)
            raise Interrupted("interrupted: nothing is lost; run the same command again to go on") from None
        finally:
            end_workers(task.workers for task in running.values())
    if failures:
        raise TaskFailure("\n".join(f"{name}: {message}" for name, message in failures.items()))


def _startable(
    pipeline: Pipeline,
    waiting: Mapping[TaskId, PlannedTask],
    running: Mapping[TaskId, _Running],
    failures: Mapping[TaskId, str],
    slots: int,
) -> Iterator[TaskId]:
    """Tasks whose inputs are done, as many as fit in the free slots; a task alone may need more than there are."""
    unfinished = {*waiting, *running, *failures}
    free = slots - sum(len(task.workers) for task in running.values())
    idle = not running
    for name, planned in list(waiting.items()):
        needed = _ranks(pipeline, name)
        if unfinished.isdisjoint(planned.task.inputs) and (needed <= free or idle):
            yield name
            free -= needed
            idle = False


def _ranks(pipeline: Pipeline, name: TaskId) -> int:
    stage = pipeline.stages[name.stage]
    return kind_of(stage).ranks(stage, mpi=False)


def least_used(gpus: Sequence[str], used: Iterable[Iterable[str]], *, count: int) -> list[str]:
    """`count` GPUs for a task's ranks: those that the fewest of the running tasks use."""
    uses = Counter(gpu for task in used for gpu in task)
    return sorted(gpus, key=lambda gpu: uses[gpu])[:count]


def _start(
    context: BaseContext,
    pipeline: Pipeline,
    planned: PlannedTask,
    root: Path,
    held: HeldFolder,
    folder: Path,
    gpus: Sequence[str],
) -> _Running:
    """Start a task's ranks, which see these GPUs only. Their rendezvous is a file in `folder`, so no port is needed."""
    name = planned.task.id
    ranks = _ranks(pipeline, name)
    rendezvous = folder / f"{name.stage}.{name.key}"
    rendezvous.unlink(missing_ok=True)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    worlds = [World(rank, ranks, rank, f"file://{rendezvous}", "specialm") for rank in range(ranks)]
    arguments = [(pipeline, root, planned, world, visible, held) for world in worlds]
    workers = Workers(context, work, arguments, logs=[log_path(root, name)] * ranks, name=str(name))
    return _Running(planned, workers, gpus)


def _error_of(root: Path, task: _Running) -> str | None:
    """Why a task that has ended failed, or None. Without the marker it has failed, whatever its exit codes."""
    name = task.planned.task.id
    log = log_path(root, name)
    if failure := task.workers.failure():
        return f"{failure[1]}\n  log: {log}"
    done = is_complete(root, *name, digest=task.planned.digest)
    return None if done else f"exited without completing the task; see {log}"
