"""The jobs of a run folder as they are now: the state of each element from Slurm, or from our records where Slurm has forgotten
the job; which tasks live jobs do; and cancelling them."""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.lock import hold_folder
from megatron_specialm.graph.earlier_layout import adopt_earlier_layout, has_earlier_layout
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm import records
from megatron_specialm.slurm.commands import Element, cancel_jobs, elements, find_by_comment, live_elements
from megatron_specialm.slurm.records import Attempt, JobRecord

# States in which Slurm itself has ended an element, whatever the records say.
BY_SLURM = {"TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"}

RUNNING = {"running", "completing"}  # live states in which the last attempt is under way
OTHERWISE = "makes it from other settings or text"
CANCEL_SECONDS = 60  # Slurm's KillWait is half of that by default


@dataclass(frozen=True)
class ElementState:
    """An element of a job. `state`: one of Slurm's live states in lower case, as running or pending; or how it ended:
    finished, failed, cancelled, or lost, which left neither an end in the records nor a trace in Slurm."""

    job: JobRecord
    number: int
    state: str
    reason: str
    live: bool
    nodes: str
    restarts: int
    seconds_left: int | None
    attempts: tuple[Attempt, ...]

    @property
    def slurm_name(self) -> str:
        """As Slurm names it: 123_4."""
        return f"{self.job.slurm_id}_{self.number}"

    def log(self, root: Path) -> Path:
        """The file of its output."""
        return records.log_path(root, self.job.submission, self.job.name, self.number)

    def seconds(self, root: Path, now: float) -> float:
        """Of all its attempts, as their supervisors have measured them, because clocks of nodes differ and are set. Records of
        earlier versions lack that: there by clocks, where a lost attempt lasted until the next began, or until the log was
        last written."""
        log = self.log(root)
        last_sign = now if self.state in RUNNING else log.stat().st_mtime if log.exists() else 0.0
        limits = [*(attempt.begin.time for attempt in self.attempts[1:]), last_sign]
        ends = [
            attempt.end.time if attempt.end else limit for attempt, limit in zip(self.attempts, limits, strict=False)
        ]
        return sum(
            max(0.0, end - attempt.begin.time) if attempt.seconds is None else attempt.seconds
            for attempt, end in zip(self.attempts, ends, strict=True)
        )


def element_states(root: Path) -> list[ElementState]:
    """All elements of all jobs that were ever submitted for a run folder, in the order of submission.

    Raises:
        ArtifactError: the registry is damaged.
        MachineError: Slurm does not answer.
    """
    jobs = submitted_jobs(root)
    known = elements([str(job.slurm_id) for job in jobs])
    return [
        _state(root, job, number, known.get((str(job.slurm_id), number)))
        for job in jobs
        for number in range(len(job.elements))
    ]


def submitted_jobs(root: Path) -> list[JobRecord]:
    """The registry's jobs that are in Slurm, each with its id, also those whose submit died before it recorded the id."""
    jobs = [
        job if job.slurm_id is not None else replace(job, slurm_id=find_by_comment(job.comment))
        for job in records.read_registry(root)
    ]
    return [job for job in jobs if job.slurm_id is not None]


def newest(states: Iterable[ElementState]) -> dict[TaskId, tuple[ElementState, str]]:
    """For each task: the element that was submitted last for it, and the digest for which it was."""
    return {
        TaskId(state.job.stage, task.key): (state, task.digest)
        for state in states
        for task in state.job.elements[state.number]
    }


def _state(root: Path, job: JobRecord, number: int, element: Element | None) -> ElementState:
    attempts = records.read_attempts(records.state_folder(root, job.submission, job.name, number))
    state, reason = judge(element, attempts)
    live = element is not None and element.is_live
    nodes = element.nodes if element is not None else ""
    if not nodes and not live and attempts:
        nodes = ",".join(attempts[-1].begin.nodes)
    restarts = max(element.restarts if element is not None else 0, len(attempts) - 1, 0)
    left = element.seconds_left if element is not None else None
    return ElementState(job, number, state, reason, live, nodes, restarts, left, tuple(attempts))


def judge(element: Element | None, attempts: Sequence[Attempt]) -> tuple[str, str]:
    """An element's state and the reason for it, from what Slurm knows (None: it has forgotten) and the records."""
    if element is not None and element.is_live:
        return element.state.lower(), element.reason
    if element is not None and element.state == "CANCELLED":
        # Any other reason is why it was pending.
        return "cancelled", element.reason if element.reason == "DependencyNeverSatisfied" else ""
    if element is not None and element.state in BY_SLURM:
        return "failed", element.state.lower().replace("_", " ")
    end = attempts[-1].end if attempts else None
    if end is not None and end.outcome == "finished":
        return "finished", ""
    if element is not None and element.state == "FAILED" and end is None:
        return "failed", element.reason
    if end is None or end.requeued:
        return "lost", ""
    return "failed", "" if end.outcome == "failed" else end.outcome


@dataclass(frozen=True)
class Live:
    """The element of a queued or running job that does a task, by Slurm's name (123_0), and the digest for which it does."""

    slurm_id: str
    digest: str


def live_tasks(jobs: Iterable[JobRecord]) -> dict[TaskId, Live]:
    """The tasks that queued and running jobs do.

    Raises:
        MachineError: Slurm does not answer.
    """
    return {
        TaskId(job.stage, task.key): Live(f"{job.slurm_id}_{number}", task.digest)
        for job, number in _live(jobs)
        for task in job.elements[number]
    }


def used_by_jobs(root: Path, jobs: Iterable[JobRecord]) -> set[str]:
    """The digests of what queued and running jobs make and read, by their job files.

    Raises:
        MachineError: Slurm does not answer.
        ArtifactError: a job file is damaged.
    """
    files = {records.job_path(root, job.submission, job.name) for job, _ in _live(jobs)}
    tasks = [task for file in files for element in records.read_job_file(file).elements for task in element]
    return {digest for task in tasks for digest in (task.digest, *task.made_from.get("inputs", {}).values())}


def _live(jobs: Iterable[JobRecord]) -> list[tuple[JobRecord, int]]:
    """The live elements of jobs, each with its number."""
    submitted = [job for job in jobs if job.slurm_id is not None]
    alive = live_elements([str(job.slurm_id) for job in submitted])
    return [
        (job, number) for job in submitted for number in range(len(job.elements)) if (job.slurm_id, number) in alive
    ]


def adopt_unattended(root: Path) -> None:
    """Convert a run folder of an earlier version's layout, where no job uses it.

    Raises:
        MachineError: a job is queued or running, or Slurm does not answer.
        ArtifactError: the folder is damaged, or such a job has worked in it since.
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
    """The tasks that live jobs do; none where this machine cannot ask Slurm."""
    jobs = records.read_registry(root)
    return live_tasks(jobs) if jobs and shutil.which("squeue") else {}


def refuse_live(root: Path, plan: Mapping[TaskId, PlannedTask]) -> None:
    """Before the missing tasks of a plan are done on this machine: check that no job does one of them, from any settings,
    because the job holds the task's lock. A machine without Slurm cannot check.

    Raises:
        MachineError: a job does, or Slurm does not answer.
    """
    live = _live_where_known(root)
    for name, planned in plan.items():
        if planned.state != "done" and name in live:
            does = "does it" if live[name].digest == planned.digest else OTHERWISE
            raise MachineError(f"{name}: job {live[name].slurm_id} {does}: let it end, or `specialm cancel` it")


def cancel(root: Path, stage: str | None) -> list[tuple[JobRecord, int]]:
    """Cancel the queued and running jobs of one stage or of all. They save what they can, and are not queued again.

    It waits for their end, a minute at most, because an earlier submit would find them alive.

    Returns:
        Each cancelled job with its number of live elements; dependent jobs before those on which they depend.

    Raises:
        MachineError: Slurm does not answer, or another command uses the run folder.
    """
    if not records.registry_path(root).exists():
        return []
    with hold_folder(root):
        alive: dict[str, tuple[JobRecord, int]] = {}
        for state in element_states(root):
            if state.live and stage in (None, state.job.stage):
                _, count = alive.get(str(state.job.slurm_id), (state.job, 0))
                alive[str(state.job.slurm_id)] = state.job, count + 1
        if alive:
            cancel_jobs(reversed(alive))
            deadline = time.monotonic() + CANCEL_SECONDS
            while live_elements(list(alive)) and time.monotonic() < deadline:
                time.sleep(0.5)
    return list(reversed(alive.values()))
