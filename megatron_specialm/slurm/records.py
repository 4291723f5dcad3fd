"""The records of a run folder's Slurm jobs, and their files.

    <root>/jobs/jobs.json                       the registry: every job ever submitted, rewritten after each sbatch
    <root>/jobs/<submission>/                   one submission: the resolved config and site, and per job:
        <job>.json  <job>.sbatch                the tasks of its elements, and the script, always of an array
        <job>.<element>.log                     the output of all attempts of an element
        <job>.<element>/attempts.jsonl          a line when an attempt begins, and one when it ends
        <job>.<element>/attempt-<n>/            the outcome that the ranks of attempt n left

Slurm forgets a job minutes after its end; these files stay.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_specialm.base.files import parse_json, read_json, write_json

NOTE = "step.json"
REMEDY = "repair or remove it"  # nothing can write these files again
Outcome = Literal["finished", "stopped", "timeout", "preempted", "failed", "hang", "bad-node"]


@dataclass(frozen=True)
class TaskRecord:
    """A task of a job's stage, and the digest of the artifact that it makes."""

    key: str
    digest: str


@dataclass(frozen=True)
class JobRecord:
    """One submitted job: an array, whose elements do their tasks one after the other.

    `name`: of the stage, or `<stage>.<wave>` where tasks of a stage read others of it. `slurm_id`: None while sbatch runs; the
    job is then found by its `comment`, which no other job has. `after`: Slurm's ids of the jobs on which it depends.
    `submitted`: Unix time. `ranks`: processes per element.
    """

    submission: str
    name: str
    stage: str
    slurm_id: str | None
    comment: str
    elements: tuple[tuple[TaskRecord, ...], ...]
    after: tuple[str, ...]
    submitted: float
    ranks: int


@dataclass(frozen=True)
class AttemptBegin:
    """The beginning of an attempt. `job`: Slurm's name of the element, as 123_0. `time`: Unix time."""

    attempt: int
    job: str
    nodes: tuple[str, ...]
    ranks: int
    time: float


@dataclass(frozen=True)
class AttemptEnd:
    """The end of an attempt. `step`: the last one of a training. `reason`: one line. `time`: Unix time. `seconds`: the
    duration; None in records of earlier versions."""

    attempt: int
    outcome: Outcome
    step: int | None
    reason: str
    requeued: bool
    time: float
    seconds: float | None = None


@dataclass(frozen=True)
class Note:
    """The state of a running attempt: the last step of a training, and its seconds so far (None as in `AttemptEnd`)."""

    step: int | None
    seconds: float | None = None


@dataclass(frozen=True)
class Attempt:
    """An attempt. Without an end it is running or was lost: its node died, or it was killed. `noted`: its last note."""

    begin: AttemptBegin
    end: AttemptEnd | None
    noted: Note | None = None

    @property
    def step(self) -> int | None:
        """The last training step, as far as known."""
        last = self.end or self.noted
        return last.step if last else None

    @property
    def seconds(self) -> float | None:
        """Its duration by the supervisor's stopwatch, as far as known."""
        last = self.end or self.noted
        return last.seconds if last else None


@dataclass(frozen=True)
class _Registry:
    """The content of `jobs.json`."""

    jobs: list[JobRecord]


@dataclass(frozen=True)
class _Event:
    """The kind of a line of `attempts.jsonl`; its other fields are those of `AttemptBegin` or `AttemptEnd`."""

    event: Literal["begin", "end"]


@dataclass(frozen=True)
class JobTask:
    """A task in a job file. `made_from`: what its digest is of."""

    key: str
    digest: str
    made_from: dict[str, Any]


@dataclass(frozen=True)
class JobFile:
    """The content of `<job>.json`: the tasks of each element."""

    stage: str
    elements: list[list[JobTask]]


def read_job_file(path: Path) -> JobFile:
    """The tasks of a job's elements.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    return read_json(path, JobFile, remedy="submit again")


def jobs_folder(root: Path) -> Path:
    return root / "jobs"


def registry_path(root: Path) -> Path:
    return jobs_folder(root) / "jobs.json"


def submission_folder(root: Path, submission: str) -> Path:
    return jobs_folder(root) / submission


def excluded_folder(root: Path) -> Path:
    """The folder of the list of excluded nodes."""
    return jobs_folder(root) / "excluded"


def job_path(root: Path, submission: str, job: str) -> Path:
    """The file of the tasks of a job's elements."""
    return submission_folder(root, submission) / f"{job}.json"


def script_path(root: Path, submission: str, job: str) -> Path:
    """The file of a job's script."""
    return submission_folder(root, submission) / f"{job}.sbatch"


def log_path(root: Path, submission: str, job: str, element: int) -> Path:
    """The log of an element, of all its attempts."""
    return submission_folder(root, submission) / f"{job}.{element}.log"


def state_folder(root: Path, submission: str, job: str, element: int) -> Path:
    """The folder in which the supervisor of an element keeps its state."""
    return submission_folder(root, submission) / f"{job}.{element}"


def attempt_folder(state: Path, attempt: int) -> Path:
    """The folder in which the ranks of an attempt leave their outcome."""
    return state / f"attempt-{attempt}"


def read_registry(root: Path) -> list[JobRecord]:
    """All jobs ever submitted for a run folder, the oldest first.

    Raises:
        ArtifactError: the registry is damaged.
    """
    path = registry_path(root)
    return read_json(path, _Registry, remedy=REMEDY).jobs if path.exists() else []


def write_registry(root: Path, jobs: Iterable[JobRecord]) -> None:
    """Replace the registry atomically. The caller holds the run folder."""
    write_json(registry_path(root), asdict(_Registry(list(jobs))))


def record_begin(state: Path, begin: AttemptBegin) -> None:
    """Record in an element's state folder that an attempt begins."""
    _append(state, {"event": "begin", **asdict(begin)})


def record_end(state: Path, end: AttemptEnd) -> None:
    """Record in an element's state folder how an attempt ended."""
    reason = end.reason.encode(errors="backslashreplace").decode()  # names of files need not be valid text
    _append(state, {"event": "end", **asdict(replace(end, reason=reason))})


def _append(state: Path, event: Mapping[str, Any]) -> None:
    """Append one line durably, on a new line even where a power loss has cut the line before."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "attempts.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(event, allow_nan=False)}\n")
        file.flush()
        os.fsync(file.fileno())


def read_attempts(state: Path) -> list[Attempt]:
    """All attempts at an element, in order; none where it has never run.

    Raises:
        ArtifactError: a line is not an event. One that a power loss has cut is ignored.
    """
    path = state / "attempts.jsonl"
    attempts: list[Attempt] = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        if not line.endswith(b"}"):  # empty, or cut short
            continue
        if parse_json(line, _Event, path=path, remedy=REMEDY).event == "begin":
            begin = parse_json(line, AttemptBegin, path=path, remedy=REMEDY)
            attempts.append(Attempt(begin, None, _noted(state, begin.attempt)))
            continue
        end = parse_json(line, AttemptEnd, path=path, remedy=REMEDY)
        if attempts and attempts[-1].begin.attempt == end.attempt:
            attempts[-1] = Attempt(attempts[-1].begin, end, attempts[-1].noted)
    return attempts


def write_note(state: Path, attempt: int, note: Note) -> None:
    """Write the state of a running attempt, for `specialm status` and for the case that the attempt is lost."""
    write_json(attempt_folder(state, attempt) / NOTE, asdict(note))


def _noted(state: Path, attempt: int) -> Note | None:
    path = attempt_folder(state, attempt) / NOTE
    return read_json(path, Note, remedy=REMEDY) if path.exists() else None
