"""The state of each element of a run folder's jobs: what Slurm says, or what our records do where Slurm has forgotten."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm import records
from megatron_specialm.slurm.queue import Element, elements, find_by_comment
from megatron_specialm.slurm.records import Attempt, JobRecord

# How Slurm ends what could not end by itself, so that the records have no say.
BY_SLURM = {"TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"}

RUNNING = {"running", "completing"}  # live states in which the last attempt is under way


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
        """Where its output stands."""
        return records.log_path(root, self.job.submission, self.job.name, self.number)

    def seconds(self, root: Path, now: float) -> float:
        """Of all its attempts, as their supervisors have measured them: clocks of nodes differ, and are set. Where earlier
        versions have not, by clocks: one that was lost lasted until the next began, or until the last sign of life in the
        log."""
        last_sign = now if self.state in RUNNING else _last_written(self.log(root))
        limits = [*(attempt.begin.time for attempt in self.attempts[1:]), last_sign]
        ends = [
            attempt.end.time if attempt.end else limit for attempt, limit in zip(self.attempts, limits, strict=False)
        ]
        return sum(
            max(0.0, end - attempt.begin.time) if attempt.seconds is None else attempt.seconds
            for attempt, end in zip(self.attempts, ends, strict=True)
        )


def element_states(root: Path) -> list[ElementState]:
    """Of all jobs that were ever submitted for a run folder, in the order of submission.

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
    """The registry's jobs that Slurm has got, each with its id: also one whose submit died before it wrote that down."""
    jobs = [
        job if job.slurm_id is not None else replace(job, slurm_id=find_by_comment(job.comment))
        for job in records.read_registry(root)
    ]
    return [job for job in jobs if job.slurm_id is not None]


def newest(states: Iterable[ElementState]) -> dict[TaskId, tuple[ElementState, str]]:
    """For each task the element that was submitted last for it, and the digest that it was to make."""
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
        # Any other reason is what it last waited for.
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


def _last_written(log: Path) -> float:
    return log.stat().st_mtime if log.exists() else 0.0
