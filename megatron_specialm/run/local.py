"""Run a plan on this machine: as many tasks at a time as there are cores for, or GPUs where there are any, each in worker
processes of its own.

A task starts when its inputs are done. When one fails, what does not depend on it goes on; the failures are reported
together at the end. Workers die with the launcher, however it ends, and hold the run folder until then.
"""

import contextlib
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_specialm.base.accelerator import visible_gpus
from megatron_specialm.base.artifacts import artifact_folder, is_complete
from megatron_specialm.base.environment import usable_cores
from megatron_specialm.base.errors import SpecialmError
from megatron_specialm.base.lock import HeldFolder
from megatron_specialm.base.process_status import hearing
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.base.temporary import short_place
from megatron_specialm.config.load import KINDS
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.plan import PlannedTask, show
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.logs import last_line, log_path
from megatron_specialm.run.progress import Progress
from megatron_specialm.run.reuse import take_over
from megatron_specialm.run.worker import ToLauncher, work, worker_context

TERMINATION_SECONDS = 20
POLL_SECONDS = 0.2
ENDING = (signal.SIGTERM, signal.SIGHUP)


class TaskFailure(SpecialmError):
    """One or more tasks ended with an error."""

    exit_code = 1


class Interrupted(SpecialmError):
    """Ctrl-C or SIGTERM ended the run."""

    exit_code = 130


@dataclass
class _Running:
    """A task's worker processes, one per rank, and the GPUs that they see."""

    planned: PlannedTask
    processes: list[BaseProcess]
    errors: Connection  # what the ranks say before they end with an error
    alive: list[Connection]  # each rank ends when its own is closed, if only by our death
    gpus: Sequence[str] = ()
    watch: Stopwatch = field(default_factory=Stopwatch)


def run_local(
    pipeline: Pipeline,
    plan: Mapping[TaskId, PlannedTask],
    root: Path,
    *,
    held: HeldFolder,
    jobs: int | None,
    progress: Progress,
) -> None:
    """Take over what a plan finds in other run folders, and do what it still lacks.

    Args:
        held: `root`, which the workers are to hold too.

    Raises:
        TaskFailure: with each failed task's error and log.
        Interrupted: by Ctrl-C, SIGTERM or SIGHUP; the workers have been ended.
    """
    (root / "jobs").mkdir(parents=True, exist_ok=True)
    slots = jobs or pipeline.local.parallel_tasks or max(1, usable_cores() // pipeline.local.threads)
    waiting = {name: planned for name, planned in plan.items() if planned.is_to_do}
    running: dict[TaskId, _Running] = {}
    failures: dict[TaskId, str] = {}
    context = worker_context([f"megatron_specialm.stages.{kind}" for kind in KINDS], threads=pipeline.local.threads)
    gpus = visible_gpus()
    if gpus and not (jobs or pipeline.local.parallel_tasks):
        slots = len(gpus)  # two trainings would rarely fit on one
    with hearing(_interrupt, *ENDING), tempfile.TemporaryDirectory(dir=short_place()) as meeting:
        try:
            take_over(plan, root)
            show(plan, root)
            while waiting or running:
                for name in _startable(pipeline, waiting, running, failures, slots):
                    own = least_used(gpus, (task.gpus for task in running.values()), count=_ranks(pipeline, name))
                    running[name] = _start(context, pipeline, waiting.pop(name), root, held, Path(meeting), own)
                    progress.started(name)
                if not running:
                    break  # everything that is left rests on a failure
                time.sleep(POLL_SECONDS)
                for name in [name for name, task in running.items() if _has_ended(task)]:
                    task = running.pop(name)
                    error = _error_of(root, task)
                    progress.finished(name, seconds=task.watch.seconds, error=error)
                    if error:
                        failures[name] = error
                progress.update(
                    {name: artifact_folder(root, *name, task.planned.digest) for name, task in running.items()}
                )
        except KeyboardInterrupt:
            raise Interrupted("interrupted: nothing is lost; run the same command again to go on") from None
        finally:
            _end(running)
    if failures:
        raise TaskFailure("\n".join(f"{name}: {message}" for name, message in failures.items()))


def _startable(
    pipeline: Pipeline,
    waiting: Mapping[TaskId, PlannedTask],
    running: Mapping[TaskId, _Running],
    failures: Mapping[TaskId, str],
    slots: int,
) -> Iterator[TaskId]:
    """Tasks whose inputs are done, as many as there are free slots for; a lone task may take more than there are."""
    unfinished = {*waiting, *running, *failures}
    free = slots - sum(len(task.processes) for task in running.values())
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
    meeting: Path,
    gpus: Sequence[str],
) -> _Running:
    """Start a task's ranks. They meet at a file, so no port is needed. Of the GPUs they see their own, each a rank's."""
    name = planned.task.id
    ranks = _ranks(pipeline, name)
    rendezvous = meeting / f"{name.stage}.{name.key}"
    rendezvous.unlink(missing_ok=True)
    processes, alive = [], []
    errors, sender = context.Pipe(duplex=False)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    for rank in range(ranks):
        world = {**visible, "RANK": str(rank), "WORLD_SIZE": str(ranks), "SPECIALM_RENDEZVOUS": f"file://{rendezvous}"}
        theirs, ours = context.Pipe(duplex=False)
        launcher = ToLauncher(sender, theirs, held)
        process = context.Process(  # type: ignore[attr-defined]
            target=work,
            args=(pipeline, root, name, planned.made_from, world, log_path(root, name), launcher),
            name=str(name),
        )
        process.start()
        theirs.close()
        processes.append(process)
        alive.append(ours)
    sender.close()
    return _Running(planned, processes, errors, alive, gpus)


def _has_ended(task: _Running) -> bool:
    """Whether all ranks are gone. When one has failed, the others, who would wait for it in vain, are ended."""
    codes = [process.exitcode for process in task.processes]
    if any(code not in (0, None) for code in codes):
        _end({task.planned.task.id: task}, within=0)
        return True
    return None not in codes


def _error_of(root: Path, task: _Running) -> str | None:
    """Why a task failed, or None. An exit code of 0 counts for nothing without the marker."""
    name = task.planned.task.id
    log = log_path(root, name)
    codes = [process.exitcode for process in task.processes]
    if not any(codes):
        done = is_complete(root, *name, digest=task.planned.digest)
        return None if done else f"ended without finishing its artifact; see {log}"
    with contextlib.suppress(EOFError):
        return f"{task.errors.recv()}\n  log: {log}"
    worst = next(code for code in codes if code)
    how = f"signal {signal.Signals(-worst).name}" if worst < 0 else f"exit code {worst}"
    return f"ended with {how}: {last_line(log)}\n  log: {log}"


def _end(running: Mapping[TaskId, _Running], *, within: float = TERMINATION_SECONDS) -> None:
    """Ask all workers to end, trainings with a checkpoint, and after so many seconds make them, and all that they have
    started."""
    processes = [process for task in running.values() for process in task.processes]
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + within
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.join()


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    """Signal a worker and what it has started; a worker so young that it leads no group yet gets it alone."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _interrupt(*_: object) -> None:
    """What ENDING does to the launcher: it ends as by Ctrl-C, workers first. A terminal that is closed may say so twice, which
    must not cut that short."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
