"""One attempt at a job, run on its first node: check the nodes, start the ranks, watch them, and when they end early, queue the
job again or record why not.

Slurm's signals arrive here. The warning before the time limit (SIGUSR1) and SIGTERM (preemption, requeue, scancel) are passed
on to the ranks in the answers to their heartbeats, because launchers swallow signals or pass them to some ranks only. Ranks
save at their next step and end. After SIGTERM, Slurm decides whether the job runs again. After a warning, a failure or a hang
it is requeued from here, and when a partition's GraceTime begins: then the ranks alone get SIGTERM, maybe before they can act.

A lost node shows in three ways. Where not all ranks have started, each node is tried alone, and those that do not answer are
excluded. Where this process lives and Slurm has not ended the job, the node's ranks are silent: that is a
hang, and the job is requeued from here without that node. Where Slurm notices first, or this node is the lost one, Slurm ends
the job and requeues it, because scripts have `--requeue`; an attempt that left no end counts as a failure (`why_not_requeued`).
"""

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from megatron_specialm.base.errors import MachineError, SpecialmError
from megatron_specialm.base.files import read_json
from megatron_specialm.base.process_status import handling
from megatron_specialm.base.protocol import ATTEMPT, ERRORS, FENCING_TOKEN, FINISHED, LAUNCHER, STOPPED, Failure, Saved
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.config.site import Launcher, Limits, Site
from megatron_specialm.slurm.allocation import Allocation, node_command, probe_command, rank_command
from megatron_specialm.slurm.commands import could_start, job_end, slurm
from megatron_specialm.slurm.heartbeats import Listener, find_stall, format_ranks, format_states, silent_ranks
from megatron_specialm.slurm.nodes import check_nodes, exclude_node, excluded_nodes, nodes_to_exclude, unreachable_nodes
from megatron_specialm.slurm.records import (
    Attempt,
    AttemptBegin,
    AttemptEnd,
    Note,
    Outcome,
    attempt_folder,
    read_attempts,
    record_begin,
    record_end,
    write_note,
)
from megatron_specialm.slurm.sbatch import JobSize

POLL_SECONDS = 0.2
SUSPENDED_SECONDS = 5.0  # between two polls: Slurm has suspended the job, supervisor and ranks
MISSED_BEATS = 4  # after so many a rank is named in the log
NOTE_SECONDS = 30.0  # between two records of the ranks' step
SAME_STEP = 3  # failures at one step, after which the job is given up

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobAttempt:
    """What to run, and where its state is kept. `excluded`: the folder of the list of excluded nodes; `watch` runs since the
    attempt began."""

    site: Site
    allocation: Allocation
    launcher: Launcher
    size: JobSize
    command: Sequence[str]
    state: Path
    excluded: Path
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def folder(self) -> Path:
        """The folder in which the ranks of this attempt leave their outcome."""
        return attempt_folder(self.state, self.allocation.attempt)


@dataclass(frozen=True)
class Ending:
    """How an attempt ended. `nodes` are excluded from the next one; `exit_code` is that of the ranks. `by_slurm`: Slurm has
    ended the job, and alone decides whether it is queued again."""

    outcome: Outcome
    reason: str
    step: int | None = None
    nodes: tuple[str, ...] = ()
    exit_code: int = 1
    by_slurm: bool = False


class _StopRequest:
    """The signal that has asked for an end, if any has."""

    by: signal.Signals | None = None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        # SIGTERM is final: Slurm has decided that the job ends here.
        if self.by is not signal.SIGTERM:
            self.by = signal.Signals(number)


def supervise(attempt: JobAttempt) -> int:
    """Run one attempt; the exit code for Slurm."""
    allocation = attempt.allocation
    stop = _StopRequest()
    with handling(stop.handle, signal.SIGTERM, signal.SIGUSR1):
        before = read_attempts(attempt.state)
        attempt.folder.mkdir(parents=True, exist_ok=True)
        begin = AttemptBegin(allocation.attempt, allocation.job, allocation.nodes, attempt.size.ranks, time.time())
        record_begin(attempt.state, begin)
        logger.info("attempt %d of job %s on %s", allocation.attempt, allocation.job, ", ".join(allocation.nodes))
        try:
            ending = _attempt(attempt, stop)
        except SpecialmError as error:  # of the machine, or a damaged file of this attempt
            ending = Ending("failed", str(error), exit_code=error.exit_code)
        final = ending.outcome == "finished" or ending.by_slurm or stop.by is signal.SIGTERM
        end_reason = None if final else why_not_requeued(ending, before, attempt.site.limits)
        again = not final and end_reason is None
        reason = ending.reason if end_reason is None else f"{ending.reason}; not queued again: {end_reason}"
        logger.log(logging.INFO if final else logging.ERROR, "%s: %s", ending.outcome, reason)
        end = _end(attempt, ending.outcome, ending.step, reason, requeued=again)
        record_end(attempt.state, end)
        if again:
            try:
                _queue_again(attempt)
            except SpecialmError as error:  # a cluster may forbid it (JobRequeue=0), or nodes.json is damaged
                record_end(
                    attempt.state, replace(end, reason=f"{reason}; cannot be queued again: {error}", requeued=False)
                )
                raise
    # 0 only if the job has finished or is queued again: Slurm starts dependent jobs after any exit with 0.
    return 0 if again or ending.outcome == "finished" else ending.exit_code


def why_not_requeued(ending: Ending, before: Sequence[Attempt], limits: Limits) -> str | None:
    """The reason for giving a job up; None if it is to be queued again.

    Preemptions are unlimited. Time limits count against `limits.timeouts`, failures since the last progress against
    `limits.failures`: a training that loses a node a day but advances continues. Three failures at the same step end the job.

    Args:
        before: the earlier attempts. One without an end was lost with its node, and counts as a failure.
    """
    if ending.outcome == "preempted":
        return None
    if ending.outcome == "timeout":
        timeouts = 1 + sum(attempt.end is not None and attempt.end.outcome == "timeout" for attempt in before)
        return f"{timeouts} time limits were reached (limits.timeouts)" if timeouts > limits.timeouts else None
    if ending.exit_code == SpecialmError.exit_code:  # the input is wrong
        return "another attempt would end the same way"
    failed = [
        attempt for attempt in before if attempt.end is None or attempt.end.outcome in ("failed", "hang", "bad-node")
    ]
    steps = [attempt.step for attempt in failed]
    in_a_row = steps[-SAME_STEP + 1 :]
    if ending.outcome != "bad-node" and in_a_row == [ending.step] * (SAME_STEP - 1):
        where = "before the first step" if ending.step is None else f"at step {ending.step}"
        return f"it has failed {SAME_STEP} times {where}"
    without_progress = _since_progress([*steps, ending.step])
    if without_progress > limits.failures:
        return f"{without_progress} attempts failed without reaching a later step (limits.failures)"
    return None


def _since_progress(steps: Sequence[int | None]) -> int:
    """The number of failures from the last one that reached a later step than all before it."""
    best, count = -1, 0
    for step in steps:
        best, count = (step, 1) if step is not None and step > best else (best, count + 1)
    return count


def _attempt(attempt: JobAttempt, stop: _StopRequest) -> Ending:
    if bad := _unfit_nodes(attempt):
        return _bad_nodes(attempt, bad, stop, found_by="preflight")
    limits = attempt.site.limits
    with Listener(attempt.allocation.address, attempt.size.ranks) as listener, _ranks(attempt, listener) as process:
        stopped_at: float | None = None
        polled, noted = time.monotonic(), -math.inf
        while not _is_over(attempt, process, stop, stopped_at):
            time.sleep(POLL_SECONDS)
            now, seconds = time.monotonic(), attempt.watch.seconds
            if now - polled > SUSPENDED_SECONDS:
                listener.extend_deadlines(now - polled)
            polled = now
            if seconds - noted > NOTE_SECONDS:
                write_note(attempt.state, attempt.allocation.attempt, Note(listener.step, seconds))
                noted = seconds
            states = dict(listener.states)
            if stop.by is not None and stopped_at is None:
                logger.info("%s: the ranks are asked to save and stop", stop.by.name)
                listener.stop, stopped_at = True, now
                if stop.by is signal.SIGTERM:  # Slurm may kill this process now; without an end it would count as lost
                    end = _end(attempt, "preempted", listener.step, "ended by Slurm", requeued=False)
                    record_end(attempt.state, end)
                # Slurm may have noticed a lost node first, and does not say so here.
                if silent := silent_ranks(states, MISSED_BEATS * limits.heartbeat_seconds, now=now):
                    logger.warning("no heartbeat lately of %s", format_ranks(silent))
            watched = stopped_at is None and not (attempt.folder / FINISHED).exists()  # ranks end one after the other
            if watched and (stall := find_stall(states, limits, now=now)) is not None:
                logger.error("%s\n%s", stall.reason, format_states(states, now=now))
                # The names come from the ranks: only those of the allocation count.
                nodes = tuple(node for node in attempt.allocation.nodes if node in stall.nodes)
                for node in nodes if len(nodes) < len(attempt.allocation.nodes) else ():
                    exclude_node(attempt.excluded, node, reason=stall.reason)
                return Ending("hang", stall.reason, listener.step, nodes)
        ending = _ending(attempt, process.poll(), stop.by, listener.step)
        started = len(listener.states) == attempt.size.ranks
        if ending.outcome == "failed" and not started and (bad := _unreachable_nodes(attempt)):
            return _bad_nodes(attempt, bad, stop, found_by="not all ranks have started")
        return ending


def _unfit_nodes(attempt: JobAttempt) -> dict[str, str]:
    settings, allocation = attempt.site.preflight, attempt.allocation
    if not settings.enabled:
        return {}
    folder = attempt.folder / "nodes"
    rendezvous = f"{allocation.address}:{_free_port()}"
    command = node_command(
        [attempt.command[0], "-m", "megatron_specialm.slurm.node_check", str(folder.resolve()), rendezvous],
        size=attempt.size, allocation=allocation, container=attempt.site.container, folder=Path.cwd(),
    )  # fmt: skip
    try:
        return check_nodes(command, folder, nodes=allocation.nodes, gpus=allocation.gpus_per_node, settings=settings)
    except MachineError:
        if bad := _unreachable_nodes(attempt):
            return bad
        raise


def _unreachable_nodes(attempt: JobAttempt) -> dict[str, str]:
    """srun starts nothing at all if one node does not answer the first one."""
    return unreachable_nodes(attempt.allocation.nodes, probe_command)


def _bad_nodes(attempt: JobAttempt, bad: Mapping[str, str], stop: _StopRequest, *, found_by: str) -> Ending:
    for node, reason in bad.items() if stop.by is not signal.SIGTERM else ():  # which cuts the check short
        exclude_node(attempt.excluded, node, reason=reason)
    reasons = "; ".join(f"{node}: {reason}" for node, reason in bad.items())
    return Ending("bad-node", f"{found_by}: {reasons}", nodes=tuple(bad))


@contextlib.contextmanager
def _ranks(attempt: JobAttempt, listener: Listener) -> Iterator[subprocess.Popen]:
    """The process that launches the ranks, srun. It has ended when the context is left."""
    allocation, port = attempt.allocation, _free_port()
    environment = {
        **os.environ,
        "MASTER_ADDR": allocation.address,
        "MASTER_PORT": str(port),
        LAUNCHER: attempt.launcher,
        **listener.channel(attempt.site.limits.heartbeat_seconds).variables(),
        ATTEMPT: str(attempt.folder.resolve()),
        FENCING_TOKEN: f"{allocation.job}/{allocation.attempt}",
    }
    command = rank_command(
        attempt.command, launcher=attempt.launcher, size=attempt.size, allocation=allocation, port=port,
        container=attempt.site.container, folder=Path.cwd(),
    )  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _is_over(attempt: JobAttempt, process: subprocess.Popen, stop: _StopRequest, stopped_at: float | None) -> bool:
    """Whether the launcher has ended. Slurm ends srun before the ranks when it ends a job: then their outcome is awaited."""
    if stopped_at is not None and time.monotonic() - stopped_at > attempt.site.limits.stop_seconds:
        return True
    if process.poll() is None:
        return False
    return stop.by is not signal.SIGTERM or any(any(attempt.folder.glob(name)) for name in (FINISHED, STOPPED, ERRORS))


def _ending(attempt: JobAttempt, code: int | None, stopped_by: signal.Signals | None, step: int | None) -> Ending:
    """How the ranks ended, by the files that they left. srun's own exit code may be 0 after a node was lost."""
    if code == 0 and (attempt.folder / FINISHED).exists():
        return Ending("finished", "all tasks are done", step)
    if stopped_by is not None:
        return _stopped(attempt, stopped_by, step)
    # A rank that SIGTERM ends before it handles signals, or SIGKILL after GraceTime, leaves nothing; its peers report an error.
    if (end := job_end(attempt.allocation.job)) is not None:
        return replace(_stopped(attempt, None, step), by_slurm=end == "ended")
    errors = [read_json(path, Failure) for path in sorted(attempt.folder.glob(ERRORS))]
    if errors:
        # A rank whose peer has died reports that; the peer's own error, if it left one, is the cause.
        first = min(errors, key=lambda failure: ("another process" in failure.error, failure.time))
        at = first.step if first.step is not None else step
        return Ending("failed", f"{first.node}: {first.error}", at, exit_code=first.exit_code)
    if (attempt.folder / STOPPED).exists():  # after errors: torchrun stops all ranks when one fails
        return _stopped(attempt, None, step)
    return Ending("failed", f"the ranks ended with exit code {code} and left no error: see the log", step)


def _stopped(attempt: JobAttempt, stopped_by: signal.Signals | None, step: int | None) -> Ending:
    saved = attempt.folder / STOPPED
    if saved.exists():
        step = read_json(saved, Saved).step
        what = "stopped" if step is None else f"saved at step {step}"
    else:
        what = "no checkpoint was saved, so it resumes from the previous one"
    if stopped_by is signal.SIGUSR1:
        return Ending("timeout", f"the time limit is near: {what}", step)
    return Ending("preempted", f"ended by Slurm: {what}", step)


def _end(attempt: JobAttempt, outcome: Outcome, step: int | None, reason: str, *, requeued: bool) -> AttemptEnd:
    return AttemptEnd(attempt.allocation.attempt, outcome, step, reason, requeued, time.time(), attempt.watch.seconds)


def _queue_again(attempt: JobAttempt) -> None:
    """Have Slurm run the job again, without the excluded nodes where enough others are left. That ends this attempt: SIGTERM
    comes at once, to this process and to the commands that it runs, which inherit that it is ignored."""
    job = attempt.allocation.job
    listed = bool(attempt.site.exclude or excluded_nodes(attempt.excluded))
    out = _nodes_to_exclude(attempt) if listed else []
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not listed:
        slurm("scontrol", "requeue", job)
        return
    slurm("scontrol", "requeuehold", job)
    try:
        slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(out)}")
    except MachineError as error:  # better with a bad node than held for ever
        logger.warning("%s", error)
    finally:
        slurm("scontrol", "release", job)


def _nodes_to_exclude(attempt: JobAttempt) -> list[str]:
    always, job = attempt.site.exclude, attempt.allocation.job
    out = nodes_to_exclude(attempt.excluded, lambda nodes: could_start(job, [*always, *nodes]))
    if again := sorted({*excluded_nodes(attempt.excluded)} - {*out}):
        logger.warning("%s: excluded, and tried again: Slurm cannot start the job without them", ", ".join(again))
    return sorted({*always, *out})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
