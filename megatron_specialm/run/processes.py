"""Worker processes on this machine: started together, one per rank, and ended together; and their logs.

`run` starts the ranks of a task with it, `parity` those of a case. No worker outlives its launcher: each holds one end of a
pipe whose other end is the launcher's. When the launcher ends, even by SIGKILL, the kernel closes that end, and kills the
worker and all processes of its group, whatever they are doing: in a collective, in C++, or stopped. The parent-death signal of
Linux would not do: the parent of a forked worker is Python's fork server, which lives as long as any of its children. All that
workers publish is atomic, so only the current work is lost.
"""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import SpecialmError
from megatron_specialm.base.output import lasting_output
from megatron_specialm.base.printing import say
from megatron_specialm.base.process_status import deferring_ends
from megatron_specialm.base.temporary import place_sockets
from megatron_specialm.graph.tasks import TaskId

TERMINATION_SECONDS = 20.0
BYTES_PER_LINE = 400  # of a log: longer ones may cost a tail some of its lines, never the last
# Warnings of Megatron-Core at import on every machine without a GPU's libraries, by their first words.
EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
)


def limit_threads(threads: int) -> None:
    """Tell every numeric library, before it is imported, how many threads this process may use."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # idle threads must not spin on the cores of other tasks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{start}" for start in EXPECTED_WARNINGS))


def ignore_expected_warnings() -> None:
    """What `limit_threads` sets for workers, in this process, which imports Megatron-Core itself."""
    for start in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=start)


def worker_context(modules: list[str], *, threads: int) -> BaseContext:
    """How workers are created: forked from a server that has imported `modules` once.

    Importing torch and Megatron-Core takes three seconds of a core, longer than many a task. A process that forks after it
    has used a GPU breaks its children, so where there is one, each worker starts a new interpreter.
    """
    limit_threads(threads)
    if Path("/dev/nvidiactl").exists():
        return multiprocessing.get_context("spawn")
    place_sockets()
    context = multiprocessing.get_context("forkserver")
    # torch's optimizers import `torch._dynamo` when they are made.
    context.set_forkserver_preload(["megatron_specialm.run.fork_server", *modules, "torch._dynamo"])
    return context


class Workers:
    """The processes of one task, one per rank.

    Args:
        work: what each process runs, with its own of `arguments`. What it prints goes to its own of `logs`. A `SpecialmError`
            reaches the launcher through a pipe, even where the disk is full.
    """

    def __init__(
        self, context: BaseContext, work: Callable[..., None], arguments: Sequence[tuple[Any, ...]], *,
        logs: Sequence[Path], name: str,
    ) -> None:  # fmt: skip
        self._logs = logs
        self._errors, errors = context.Pipe(duplex=False)
        self._alive: list[Connection] = []  # each worker is killed when its own is closed
        self._processes: list[BaseProcess] = []
        self._failed: tuple[int, int] | None = None  # the first rank, and its exit code
        for rank, own in enumerate(arguments):
            theirs, ours = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=_main, args=(rank, work, own, logs[rank], theirs, errors), name=name
            )
            _start(context, process)
            theirs.close()
            self._processes.append(process)
            self._alive.append(ours)
        errors.close()

    def __len__(self) -> int:
        return len(self._processes)

    def have_ended(self) -> bool:
        """Whether all processes have ended. When one fails, the others, which would wait for it in a collective, are killed."""
        codes = [process.exitcode for process in self._processes]
        if any(codes) and self._failed is None:
            self._failed = next((rank, code) for rank, code in enumerate(codes) if code)
            end_workers([self], within=0)
        return self._failed is not None or None not in codes

    def failure(self) -> tuple[int, str] | None:
        """Once all have ended: the rank that failed first, and why; None where none has."""
        if self._failed is None:
            return None
        with contextlib.suppress(EOFError):  # none of them has sent an error
            return self._errors.recv()
        rank, code = self._failed
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return rank, f"ended with {how}: {last_line(self._logs[rank])}"

    def send(self, number: signal.Signals) -> None:
        """Signal all workers and the processes that they have started."""
        for process in self._processes:
            _signal(process, number)

    def end(self, deadline: float) -> None:
        """Wait until a monotonic time for the workers to end, and kill those that have not, with what they have started."""
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            _signal(process, signal.SIGKILL)
            process.join()


def end_workers(groups: Iterable[Workers], *, within: float = TERMINATION_SECONDS) -> None:
    """Ask workers to end (trainings save a checkpoint), and kill those that have not ended after so many seconds."""
    groups = list(groups)
    for workers in groups:
        workers.send(signal.SIGTERM)
    deadline = time.monotonic() + within
    for workers in groups:
        workers.end(deadline)


def _start(context: BaseContext, process: BaseProcess) -> None:
    """Start a worker. Half a request to fork would end the fork server, so a signal to end waits. Interpreters start with
    Ctrl-C blocked, which reaches them until they lead a session of their own (`_end_with`, `fork_server.py`)."""
    forked = context.get_start_method() == "forkserver"
    with deferring_ends():
        resource_tracker.ensure_running()  # to start it later would unblock Ctrl-C
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            (forkserver.ensure_running if forked else process.start)()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if forked:  # Ctrl-C twice ends the wait for a server whose imports hang
            process.start()


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    """Signal a worker's process group, or the worker alone where it has only begun and leads no group yet."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _main(
    rank: int, work: Callable[..., None], arguments: tuple[Any, ...], log: Path, launcher: Connection, errors: Connection,
) -> None:  # fmt: skip
    """The life of a worker."""
    _end_with(launcher)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with lasting_output(may_be_lost=True):
        try:
            work(*arguments)
        except SpecialmError as error:
            errors.send((rank, str(error)))
            say(f"error: {error}", error=True)
            sys.exit(error.exit_code)


def _end_with(launcher: Connection) -> None:
    """Have the kernel kill this process and all that it starts when the launcher's end of a pipe is closed. Nothing is ever
    written to the pipe, and no other process may hold this end, because it stores whom to kill. The process leads a session of
    its own: Ctrl-C reaches the launcher alone, which then ends its workers in order."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # discards one that has come before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pipe = launcher.fileno()
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if launcher.poll(0):  # closed before
        os.killpg(os.getpid(), signal.SIGKILL)


def log_path(root: Path, name: TaskId) -> Path:
    """The log of a task that was run on this machine."""
    return root / "jobs" / f"{name.stage}.{name.key}.log"


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, which may be large; fewer where lines are long, none where there is no log."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - max(65536, lines * BYTES_PER_LINE)))
        return file.read().decode("utf-8", errors="replace").rstrip().split("\n")[-lines:]


def last_line(path: Path) -> str:
    """The last line of a log that is not empty."""
    return next((line.strip() for line in reversed(tail(path, 100)) if line.strip()), "the log is empty")
