"""One at a time in a run folder."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_specialm.base.errors import MachineError


@contextlib.contextmanager
def hold_folder(root: Path) -> Iterator[None]:
    """Hold a run folder, which is made where it is missing. The kernel lets go of the lock when its holder dies, however
    it dies, and a shared filesystem does so for a holder on another machine.

    Raises:
        MachineError: another process holds it, with its number and its machine.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            pid, _, host = lock.read().partition(" ")
            raise MachineError(
                f"{root}: another command (pid {pid}{host and ' on ' + host}) is at work here: wait or end it"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()} {socket.gethostname()}")
        lock.flush()
        yield
