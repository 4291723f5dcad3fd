"""What a job runs on its first node: looks at the nodes, starts the ranks, watches them, and when they end early, has the job
queued again or says why not.

Slurm's signals come here. The warning before the time limit (SIGUSR1) and SIGTERM (preemption, requeue, scancel) are passed on
to the ranks by the answers to their heartbeats, under any launcher; ranks save at their next step and end. After SIGTERM it is
Slurm that knows whether the job is to run again. After a warning, a failure or a hang it is queued again from here; and where
the ranks alone were told to end, as they are when a partition's GraceTime begins.
"""

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from megatron_specialm.base.errors import MachineError, SpecialmError
from megatron_specialm.base.files import read_json
from megatron_specialm.base.outcome import Failure, Saved
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.config.site import Launcher, Site
from megatron_specialm.slurm.allocation import Allocation
from megatron_specialm.slurm.attempts import Ending, reason_to_end
from megatron_specialm.slurm.heartbeats import Listener, describe, not_heard, trouble, who
from megatron_specialm.slurm.nodes import exclude_node, excluded_nodes
from megatron_specialm.slurm.preflight import check_nodes
from megatron_specialm.slurm.queue import slurm
from megatron_specialm.slurm.ranks import node_command, rank_command
from megatron_specialm.slurm.records import (
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
from megatron_specialm.slurm.sbatch import Shape

POLL_SECONDS = 0.2
SUSPENDED_SECONDS = 5.0  # between two looks: Slurm has suspended the job, supervisor and ranks
FINISHED, STOPPED, ERRORS = "finished.json", "stopped.json", "error-*.json"  # what ranks leave: base/outcome.py
QUIET_BEATS = 4  # heartbeats that a rank has left out, which is worth telling
NOTE_SECONDS = 30.0  # between two notes of how far the ranks are

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What to run, and where its state goes. `excluded`: the folder that lists the nodes to leave out; `watch` runs since the
    attempt began."""

    site: Site
    allocation: Allocation
    launcher: Launcher
    shape: Shape
    command: Sequence[str]
    state: Path
    excluded: Path
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def folder(self) -> Path:
        """Where the ranks of this attempt leave their outcome."""
        return attempt_folder(self.state, self.allocation.attempt)


class _Asked:
    """Which signal has asked for an end, if any has."""

    by: signal.Signals | None = None

    def hear(self, number: int, _frame: FrameType | None) -> None:
        # SIGTERM is the last word: Slurm has decided by itself that the job ends here.
        if self.by is not signal.SIGTERM:
            self.by = signal.Signals(number)


def supervise(work: Work) -> int:
    """Run one attempt; the exit code for Slurm."""
    allocation = work.allocation
    with _hearing_signals() as asked:
        before = read_attempts(work.state)
        work.folder.mkdir(parents=True, exist_ok=True)
        begin = AttemptBegin(allocation.attempt, allocation.job, allocation.nodes, work.shape.ranks, time.time())
        record_begin(work.state, begin)
        logger.info("attempt %d of job %s on %s", allocation.attempt, allocation.job, ", ".join(allocation.nodes))
        try:
            ending = _attempt(work, asked)
        except SpecialmError as error:  # the machine's doing, or a file of this attempt that is damaged
            ending = Ending("failed", str(error), exit_code=error.exit_code)
        final = ending.outcome == "finished" or asked.by is signal.SIGTERM
        end_reason = None if final else reason_to_end(ending, before, work.site.limits)
        again = not final and end_reason is None
        reason = ending.reason if end_reason is None else f"{ending.reason}; not queued again: {end_reason}"
        logger.log(logging.INFO if final else logging.ERROR, "%s: %s", ending.outcome, reason)
        end = _end(work, ending.outcome, ending.step, reason, requeued=again)
        record_end(work.state, end)
        if again:
            try:
                _queue_again(work)
            except MachineError as error:  # a cluster may forbid it: JobRequeue=0, or a job without --requeue
                record_end(
                    work.state, replace(end, reason=f"{reason}; cannot be queued again: {error}", requeued=False)
                )
                raise
    # Never 0 where something is left to do: jobs that wait for this one would start, whoever has sent the signal.
    return 0 if again or ending.outcome == "finished" else ending.exit_code


def _attempt(work: Work, asked: _Asked) -> Ending:
    if bad := _unfit_nodes(work):
        for node, reason in bad.items() if asked.by is not signal.SIGTERM else ():  # by which they have been cut short
            exclude_node(work.excluded, node, reason=reason)
        reasons = "; ".join(f"{node}: {reason}" for node, reason in bad.items())
        return Ending("bad-node", f"preflight: {reasons}", nodes=tuple(bad))
    with Listener(work.allocation.address, work.shape.ranks) as listener, _ranks(work, listener) as process:
        asked_at: float | None = None
        looked, noted = time.monotonic(), -math.inf
        while not _is_over(work, process, asked, asked_at):
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if now - looked > SUSPENDED_SECONDS:
                listener.forgive(now - looked)
            looked = now
            seconds = work.watch.seconds
            if seconds - noted > NOTE_SECONDS:
                write_note(work.state, work.allocation.attempt, Note(listener.step, seconds))
                noted = seconds
            if asked.by is not None and asked_at is None:
                logger.info("%s: the ranks are asked to save and stop", asked.by.name)
                listener.stop, asked_at = True, now
                _note_early(work, asked.by, listener.step)
                # Slurm may have found a lost node before us: it does not say so here, but its ranks do not speak.
                if quiet := not_heard(listener.beats, QUIET_BEATS * work.site.limits.heartbeat_seconds, now=now):
                    logger.warning("not heard for some heartbeats: %s", who(quiet))
            watched = asked_at is None and not (work.folder / FINISHED).exists()  # ranks end one after the other
            if watched and (found := trouble(listener.beats, work.site.limits, now=now)) is not None:
                logger.error("%s\n%s", found.reason, describe(listener.beats, now=now))
                ours = tuple(
                    node for node in work.allocation.nodes if node in found.nodes
                )  # ranks have told their names
                for node in ours if len(work.allocation.nodes) > len(ours) else ():
                    exclude_node(work.excluded, node, reason=found.reason)
                return Ending("hang", found.reason, listener.step, ours)
        return _ending(work, process.poll(), asked, listener.step)


def _unfit_nodes(work: Work) -> dict[str, str]:
    settings, allocation = work.site.preflight, work.allocation
    if not settings.enabled:
        return {}
    folder = work.folder / "nodes"
    meeting = f"{allocation.address}:{_free_port()}"
    command = node_command(
        [work.command[0], "-m", "megatron_specialm.slurm.node_check", str(folder.resolve()), meeting],
        shape=work.shape, allocation=allocation, container=work.site.container, folder=Path.cwd(),
    )  # fmt: skip
    return check_nodes(command, folder, nodes=allocation.nodes, gpus=allocation.gpus_per_node, settings=settings)


@contextlib.contextmanager
def _ranks(work: Work, listener: Listener) -> Iterator[subprocess.Popen]:
    """The launcher of the ranks. It is gone when this is left."""
    allocation, port = work.allocation, _free_port()
    environment = {
        **os.environ,
        "MASTER_ADDR": allocation.address,
        "MASTER_PORT": str(port),
        "SPECIALM_LAUNCHER": work.launcher,
        "SPECIALM_HEARTBEAT": listener.channel,
        "SPECIALM_HEARTBEAT_SECONDS": str(work.site.limits.heartbeat_seconds),
        "SPECIALM_ATTEMPT": str(work.folder.resolve()),
        "SPECIALM_INCARNATION": f"{allocation.job}/{allocation.attempt}",
    }
    command = rank_command(
        work.command, launcher=work.launcher, shape=work.shape, allocation=allocation, port=port,
        container=work.site.container, folder=Path.cwd(),
    )  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _is_over(work: Work, process: subprocess.Popen, asked: _Asked, asked_at: float | None) -> bool:
    """When the launcher is gone; but Slurm ends srun before the ranks when it ends a job, and those are waited for."""
    if asked_at is not None and time.monotonic() - asked_at > work.site.limits.stop_seconds:
        return True
    if process.poll() is None:
        return False
    return asked.by is not signal.SIGTERM or _left(work)


def _left(work: Work) -> bool:
    """Whether the ranks have left an outcome."""
    return any((work.folder / name).exists() for name in (FINISHED, STOPPED)) or any(work.folder.glob(ERRORS))


def _ending(work: Work, code: int | None, asked: _Asked, step: int | None) -> Ending:
    """How the ranks ended, by what they left. srun's own exit code may be 0 after a node was lost."""
    if code == 0 and (work.folder / FINISHED).exists():
        return Ending("finished", "all tasks are done", step)
    if asked.by is not None:
        return _stopped(work, asked.by, step)
    errors = [read_json(path, Failure) for path in sorted(work.folder.glob(ERRORS))]
    if errors:
        # One whose peer has died says so; the peer's own error, if it could leave one, is the cause.
        first = min(errors, key=lambda failure: ("another process" in failure.error, failure.time))
        at = first.step if first.step is not None else step
        return Ending("failed", f"{first.node}: {first.error}", at, exit_code=first.exit_code)
    if (work.folder / STOPPED).exists():  # torchrun tells ranks to stop when one fails: its error counts, above
        return _stopped(work, None, step)
    return Ending("failed", f"the ranks ended with exit code {code} and left no error: see the log", step)


def _stopped(work: Work, asked: signal.Signals | None, step: int | None) -> Ending:
    saved = work.folder / STOPPED
    if saved.exists():
        step = read_json(saved, Saved).step
        what = "stopped" if step is None else f"saved at step {step}"
    else:
        what = "nothing was saved, so it goes on from the checkpoint before"
    if asked is signal.SIGUSR1:
        return Ending("timeout", f"the time limit is near: {what}", step)
    return Ending("preempted", f"ended by Slurm: {what}", step)


def _note_early(work: Work, asked: signal.Signals, step: int | None) -> None:
    """After SIGTERM Slurm may kill this process at any moment: an attempt without an end would count as a lost one."""
    if asked is signal.SIGTERM:
        record_end(work.state, _end(work, "preempted", step, "ended by Slurm", requeued=False))


def _end(work: Work, outcome: Outcome, step: int | None, reason: str, *, requeued: bool) -> AttemptEnd:
    return AttemptEnd(work.allocation.attempt, outcome, step, reason, requeued, time.time(), work.watch.seconds)


def _queue_again(work: Work) -> None:
    """Have Slurm run the job once more, without the nodes that are no good. That ends this attempt: SIGTERM comes at once, to
    this process and to the commands it runs, which inherit that it is ignored."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job = work.allocation.job
    out = sorted({*work.site.exclude, *excluded_nodes(work.excluded)})
    if not out:
        slurm("scontrol", "requeue", job)
        return
    slurm("scontrol", "requeuehold", job)
    try:
        slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(out)}")
    except MachineError as error:  # rather with a bad node than held for ever
        logger.warning("%s", error)
    slurm("scontrol", "release", job)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _hearing_signals() -> Iterator[_Asked]:
    asked = _Asked()
    previous = {number: signal.signal(number, asked.hear) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        sys.stdout.flush()
        for number, handler in previous.items():
            signal.signal(number, handler)
