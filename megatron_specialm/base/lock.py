"""One at a time in a run folder."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_specialm.base.errors import MachineError

POLL_SECONDS = 0.1
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # Lustre without `flock`; NFS without its lock service


@contextlib.contextmanager
def hold_folder(root: Path, *, wait_seconds: float = 0) -> Iterator[None]:
    """Hold a run folder, which is made where it is missing. The kernel lets go of the lock when its holder dies, however
    it dies, and a shared filesystem does so for a holder on another machine.

    Args:
        wait_seconds: for another holder to let go.

    Raises:
        MachineError: another process holds it, with its number and its machine; or the filesystem knows no locks.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a+") as lock:
        deadline = time.monotonic() + wait_seconds
        while not _taken(lock):
            if time.monotonic() >= deadline:
                lock.seek(0)
                pid, _, host = lock.read().partition(" ")
                raise MachineError(
                    f"{root}: another command (pid {pid}{host and ' on ' + host}) is at work here: wait or end it"
                )
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, and nobody reads who has it
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{os.getpid()} {socket.gethostname()}".encode())
        yield


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
