"""Slurm's commands about our jobs: squeue, sacct for jobs that squeue has forgotten, scancel, and sbatch's judgement of a job
that is in Slurm already."""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_specialm.base.errors import MachineError

ElementId = tuple[str, int]  # the array's id and the element's number: 123_4
ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
    "REVOKED",
}  # fmt: skip
REQUEUED = {"COMPLETING", "PENDING", "REQUEUED"}  # of a job whose batch script still runs: Slurm has ended it
# "grace": a partition's GraceTime runs, and ranks have got SIGTERM. "ended": preempted, requeued, cancelled, or a node lost.
JobEnd = Literal["grace", "ended"]
COMMAND_SECONDS = 60
RETRY_SECONDS = 30  # a controller that is being restarted is back by then
# Messages of a controller that does not answer, as opposed to one that refuses.
NO_ANSWER = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "Connection refused",
    "Unexpected missing socket error",
)
OPTIONS = ("SQUEUE_", "SACCT_", "SCANCEL_")
# Variables of a launcher or job around this process would mislead a new job's ranks; SBATCH_* overrule its script.
NOT_INHERITED = (
    "SBATCH_",
    "SLURM_",
    "OMPI_",
    "PMIX_",
    "PMI_",
    "TORCHELASTIC_",
    "SPECIALM_",
    "MASTER_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)
NO_NODES = "Requested node configuration is not available"
WAITING = ("#SBATCH --dependency=", "#SBATCH --kill-on-invalid-dep=")  # for jobs that Slurm may have forgotten
# The reason is the last field: only it may contain any character.
FIELDS = ("ArrayJobID", "ArrayTaskID", "State", "RestartCnt", "TimeLeft", "NodeList", "Reason")


@dataclass(frozen=True)
class Element:
    """An array's element as Slurm has it: `state` in Slurm's words, as RUNNING; `nodes` as node[1-2], empty where it has
    none; `restarts`: how often it was queued again; `seconds_left` of its time limit while it runs and has one."""

    state: str
    reason: str
    nodes: str
    restarts: int
    seconds_left: int | None

    @property
    def is_live(self) -> bool:
        """Queued, running, or on its way from one to the other."""
        return self.state not in ENDED


def sbatch_environment() -> dict[str, str]:
    """The environment for sbatch."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    return environment | {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}


def slurm(*command: str, stdin: str = "") -> str:
    """The output of a Slurm command. It is tried again while the controller does not answer, as during a restart.

    Raises:
        MachineError: Slurm is not installed, refuses, or does not answer for `RETRY_SECONDS`.
    """
    deadline = time.monotonic() + RETRY_SECONDS
    # The user's own filters and formats would hide jobs of ours; long lists of elements must not be cut.
    own = {name: value for name, value in os.environ.items() if not name.startswith(OPTIONS)}
    environment = sbatch_environment() if command[0] == "sbatch" else {**own, "SLURM_BITSTR_LEN": "0"}
    while True:
        try:
            outcome = subprocess.run(
                command, input=stdin, capture_output=True, text=True, errors="replace", timeout=COMMAND_SECONDS,
                env=environment,
            )  # fmt: skip
        except FileNotFoundError:
            raise MachineError(
                f"{command[0]}: not found: use a login node of the Slurm cluster, or put it on PATH"
            ) from None
        except subprocess.TimeoutExpired:
            raise MachineError(f"{command[0]}: Slurm has not answered for {COMMAND_SECONDS} s: try later") from None
        if outcome.returncode == 0:
            return outcome.stdout
        message = " ".join(outcome.stderr.split())
        # A negative code: the command itself has crashed.
        if outcome.returncode >= 0 and not any(words in message for words in NO_ANSWER):
            raise MachineError(f"{' '.join(command)}: {message or f'exit code {outcome.returncode}'}")
        if time.monotonic() >= deadline:
            raise MachineError(f"{command[0]}: {message}: try later; jobs run on meanwhile")
        time.sleep(1)


def elements(slurm_ids: Sequence[str]) -> dict[ElementId, Element]:
    """All elements of arrays that Slurm still knows; those that squeue has forgotten are from the accounting, where there is
    one.

    Raises:
        MachineError: Slurm does not answer.
    """
    if not slurm_ids:
        return {}
    found = _queued(slurm_ids)
    forgotten = sorted(set(slurm_ids) - {job for job, _ in found}, key=int)
    return {**_accounted(forgotten), **found} if forgotten else found


def live_elements(slurm_ids: Sequence[str]) -> set[ElementId]:
    """Those elements of arrays that are queued, running, or on their way from one to the other.

    Raises:
        MachineError: Slurm does not answer.
    """
    return {name for name, element in _queued(slurm_ids).items() if element.is_live} if slurm_ids else set()


def find_by_comment(comment: str) -> str | None:
    """The id of the user's array, queued or ended not long ago, that was submitted with this comment.

    Raises:
        MachineError: Slurm does not answer.
    """
    for line in slurm("squeue", "--me", "--states=all", "--noheader", "--format=%F|%k").splitlines():
        job, _, found = line.partition("|")
        if found.strip() == comment:
            return job.strip()
    return None


def job_end(job: str) -> JobEnd | None:
    """How far Slurm is in ending this job. None if it lets the job run, or does not answer."""
    try:
        shown = slurm("scontrol", "show", "job", job)
    except MachineError:
        return None
    state = re.search(r"\bJobState=(\w+)", shown)
    if state is not None and state[1] in ENDED | REQUEUED:
        return "ended"
    return "grace" if re.search(r"\bPreemptTime=\d", shown) else None


def could_start(job: str, exclude: Sequence[str]) -> bool:
    """Whether Slurm would find nodes for this job, now or later, without those of a list. True where it does not say: not every
    cluster has sbatch on its nodes."""
    try:
        lines = slurm("scontrol", "write", "batch_script", job, "-").splitlines()
        script = "\n".join(line for line in lines if not line.startswith(WAITING))
        slurm("sbatch", "--test-only", f"--exclude={','.join(exclude)}", stdin=script)
    except MachineError as error:
        return NO_NODES not in str(error)
    return True


def cancel_jobs(slurm_ids: Iterable[str]) -> None:
    """Cancel whole arrays; those that have ended are ignored.

    Raises:
        MachineError: Slurm does not answer, or they are somebody else's.
    """
    slurm("scancel", *slurm_ids)


def _queued(slurm_ids: Sequence[str]) -> dict[ElementId, Element]:
    wanted = ["--array", "--states=all", "--noheader", f"--jobs={','.join(slurm_ids)}"]
    try:
        output = slurm("squeue", *wanted, f"--Format={','.join(f'{field}:|' for field in FIELDS)}")
    except MachineError as error:
        if "Invalid job id specified" in str(error):  # when it knows none of them
            return {}
        raise
    return dict(parse_squeue(output))


def parse_squeue(output: str) -> Iterator[tuple[ElementId, Element]]:
    """The elements in squeue's output of `FIELDS`."""
    for line in output.splitlines():
        values = [value.strip() for value in line.split("|", len(FIELDS) - 1)]
        if len(values) < len(FIELDS) or not values[1].isdecimal():
            continue  # not an element of an array, so not ours
        job, number, state, restarts, left, nodes, reason = values
        known_reason = "" if reason.strip("|") == "None" else reason.strip("|")
        seconds = _seconds(left) if state == "RUNNING" else None
        yield (job, int(number)), Element(state, known_reason, nodes, int(restarts), seconds)


def _seconds(text: str) -> int | None:
    """Seconds of Slurm's days-hours:minutes:seconds; None where there is no limit."""
    days, _, clock = text.rpartition("-")
    parts = [days or "0", *clock.split(":")]
    if not all(part.isdecimal() for part in parts):
        return None
    total = 0
    for part in parts[1:]:
        total = total * 60 + int(part)
    return int(parts[0]) * 86400 + total


def _accounted(slurm_ids: Sequence[str]) -> dict[ElementId, Element]:
    """The elements in the accounting. Many clusters have none, which is no error."""
    wanted = ["--noheader", "--parsable2", "--allocations", f"--jobs={','.join(slurm_ids)}"]
    try:
        return dict(parse_sacct(slurm("sacct", *wanted, "--format=JobID,State,NodeList")))
    except MachineError:
        return {}


def parse_sacct(output: str) -> Iterator[tuple[ElementId, Element]]:
    """The elements in sacct's output. Those that never ran share a line, as 27_[0-1,4]."""
    for line in output.splitlines():
        name, _, rest = line.partition("|")
        state, _, nodes = rest.partition("|")
        job, _, numbers = name.partition("_")
        words = state.split()  # CANCELLED by 1000
        nodes = "" if nodes == "None assigned" else nodes
        for number in _numbers(numbers):
            yield (job, number), Element(words[0], " ".join(words[1:]), nodes, 0, None)


def _numbers(text: str) -> Iterator[int]:
    """The numbers of Slurm's 4 or [0-1,4%2]."""
    for part in text.strip("[]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            yield from range(int(first), int(last if last.isdecimal() else first) + 1)
