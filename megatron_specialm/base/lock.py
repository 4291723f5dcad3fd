"""The locks of a run folder.

    <root>/.lock                  one command at a time: `run` (rank 0 under a launcher), `submit`, `cancel`, `clean`
    <root>/.locks/<stage>/<key>   one worker at a time per task; rank 0 locks
    <root>/.locks/.placing        one process at a time that moves artifacts in, for `reuse` or from an older layout

Jobs under a supervisor share the first two locks with each other. A new attempt at a job must not wait for the previous one's
ranks on a node that is cut off; `check_fence` in `base/artifacts.py` keeps those from publishing. `.placing` is exclusive for
jobs too, so that the next job finds the artifacts. The ranks of a submitted job lock only their task, not the folder. So jobs
run concurrently, and a `run` cannot do a task while a job does it.

Locks are the kernel's (`flock`). A lock belongs to an open file and is released when the last process that has the file open
ends, however it ends; on a shared filesystem this works between machines. A command shares the open file with its workers, so
that the folder stays locked until all of them have ended.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any

from megatron_specialm.base.artifacts import fencing_token
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.protocol import FENCING_TOKEN

POLL_SECONDS = 0.1
HANDOVER_SECONDS = 5.0  # in which the workers of a killed command end
PLACING_SECONDS = 3600.0  # in which another job copies or hashes large artifacts
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # Lustre without `flock`; NFS without its lock service


class HeldFolder:
    """A run folder that this process has locked. Passing it to a `multiprocessing` process shares the lock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], "HeldFolder"], tuple[Any]]:
        return _held_too, (reduction.DupFd(self._descriptor),)


def _held_too(duplicate: Any) -> HeldFolder:
    return HeldFolder(duplicate.detach())


def in_job() -> bool:
    """Whether this is a rank of a job under a supervisor, whose locks are shared."""
    return FENCING_TOKEN in os.environ


@contextlib.contextmanager
def hold_folder(root: Path, *, wait_seconds: float = 0, shared: bool = False) -> Iterator[HeldFolder]:
    """Lock a run folder; it is created if missing.

    Args:
        wait_seconds: for another holder to release it.
        shared: with other shared holders; otherwise exclusive.

    Raises:
        MachineError: another process holds it, named by its id and host; or the filesystem has no locks.
    """

    def command(holder: str) -> str:
        pid, _, host = holder.partition(" ")
        return f"another command (pid {pid}{host and ' on ' + host}), or a worker that it has left,"

    sign, does = f"{os.getpid()} {socket.gethostname()}", "uses this run folder: wait or end it"
    path = root / ".lock"
    with _locked(path, sign, root, does, shared=shared, wait_seconds=wait_seconds, named=command) as descriptor:
        yield HeldFolder(descriptor)


@contextlib.contextmanager
def hold_task(root: Path, stage: str, key: str) -> Iterator[None]:
    """Lock a task while doing it.

    Raises:
        MachineError: another process is doing it, with its fencing token; or the filesystem has no locks.
    """
    path, does = root / ".locks" / stage / key, "is doing this task: wait until that has ended, or end it"
    with _locked(path, fencing_token(), f"{stage}/{key}", does, shared=in_job(), wait_seconds=HANDOVER_SECONDS):
        yield


@contextlib.contextmanager
def hold_placing(root: Path) -> Iterator[None]:
    """Lock moving complete artifacts in; waits for another holder.

    Raises:
        MachineError: another process has held the lock for long, with its fencing token; or the filesystem has no locks.
    """
    path = root / ".locks" / ".placing"  # no stage has such a name
    does = "takes over finished work: wait until that has ended, or end it"
    with _locked(path, fencing_token(), root, does, shared=False, wait_seconds=PLACING_SECONDS):
        yield


@contextlib.contextmanager
def _locked(
    path: Path, sign: str, what: object, does: str, *,
    shared: bool, wait_seconds: float, named: Callable[[str], str] = str,
) -> Iterator[int]:  # fmt: skip
    """Hold a lock file, and write the holder's name into it. `what`, `does`, `named`: for the error about another holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        deadline = time.monotonic() + wait_seconds
        while not _taken(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                lock.seek(0)
                raise MachineError(f"{what}: {named(lock.read())} {does}")
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(OSError):  # on a full disk the lock works without its holder's name
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
