"""Who may work in a run folder.

    <root>/.lock                  one command at a time: `run`, under launchers by its first rank, `submit` and `cancel`
    <root>/.locks/<stage>/<key>   who works at a task, by its first rank
    <root>/.locks/.placing        who puts whole artifacts in their places, from earlier versions or other run folders

Jobs that a supervisor attends share their locks with each other: an attempt at a job must not wait for ranks of the one before,
on a node that may only be cut off, which `check_fence` of `base/artifacts.py` keeps from publishing. Only one at a
time places whole artifacts, job or not: the next one then finds them there. The ranks of `specialm submit` hold their tasks
alone, not the folder. So jobs work beside each other, and no `run` beside a job at its task.

A lock is the kernel's (`flock`): it belongs to an open file, and is let go when the last process that has the file is gone,
however it ends, and on a shared filesystem also for a holder on another machine. A command shares the open file with its
workers, so that the folder is held for as long as any of them lives.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any

from megatron_specialm.base.artifacts import incarnation
from megatron_specialm.base.errors import MachineError

POLL_SECONDS = 0.1
HANDOVER_SECONDS = 5.0  # for workers of a command that was killed to end
PLACING_SECONDS = 3600.0  # for another job to copy or hash large artifacts
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # Lustre without `flock`; NFS without its lock service


class HeldFolder:
    """A folder that this process holds. Handed to a process of `multiprocessing`, it is held by that one too."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], "HeldFolder"], tuple[Any]]:
        return _held_too, (reduction.DupFd(self._descriptor),)


def _held_too(duplicate: Any) -> HeldFolder:
    return HeldFolder(duplicate.detach())


def in_job(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a rank of a job that a supervisor attends, which shares its locks."""
    return "SPECIALM_INCARNATION" in environ


@contextlib.contextmanager
def hold_folder(root: Path, *, wait_seconds: float = 0, shared: bool = False) -> Iterator[HeldFolder]:
    """Hold a run folder, which is made where it is missing.

    Args:
        wait_seconds: for another holder to let go.
        shared: with others who share it; else alone.

    Raises:
        MachineError: another process holds it, with its number and its machine; or the filesystem knows no locks.
    """

    def refusal(holder: str) -> str:
        pid, _, host = holder.partition(" ")
        who = f"another command (pid {pid}{host and ' on ' + host}), or a worker that it has left,"
        return f"{root}: {who} is at work here: wait or end it"

    sign = f"{os.getpid()} {socket.gethostname()}"
    with _locked(root / ".lock", sign, refusal, shared=shared, wait_seconds=wait_seconds) as descriptor:
        yield HeldFolder(descriptor)


@contextlib.contextmanager
def hold_task(root: Path, stage: str, key: str) -> Iterator[None]:
    """Hold a task while working at it.

    Raises:
        MachineError: another process works at it, with its incarnation; or the filesystem knows no locks.
    """

    def refusal(holder: str) -> str:
        return f"{stage}/{key}: {holder} is at work on it: wait until that has ended, or end it"

    path = root / ".locks" / stage / key
    with _locked(path, incarnation(), refusal, shared=in_job(), wait_seconds=HANDOVER_SECONDS):
        yield


@contextlib.contextmanager
def hold_placing(root: Path) -> Iterator[None]:
    """Be the only one who puts whole artifacts in their places; another one is waited for.

    Raises:
        MachineError: another process has been at it for long, with its incarnation; or the filesystem knows no locks.
    """

    def refusal(holder: str) -> str:
        return f"{root}: {holder} takes over finished work: wait until that has ended, or end it"

    path = root / ".locks" / ".placing"  # no stage has such a name
    with _locked(path, incarnation(), refusal, shared=False, wait_seconds=PLACING_SECONDS):
        yield


@contextlib.contextmanager
def _locked(
    path: Path, sign: str, refusal: Callable[[str], str], *, shared: bool, wait_seconds: float
) -> Iterator[int]:
    """Have the lock of a file, which then names who has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        deadline = time.monotonic() + wait_seconds
        while not _taken(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                lock.seek(0)
                raise MachineError(refusal(lock.read()))
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, and nobody reads who has it
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), sign.encode())
        yield lock.fileno()


def _taken(lock: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise MachineError(
            f"{lock.name}: the filesystem takes no locks ({error.strerror}): have it mounted with them (Lustre: -o flock), "
            "or choose another root"
        ) from None
    return True
