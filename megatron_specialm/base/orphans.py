"""No worker outlives its launcher.

A worker has one end of a pipe, and its launcher the other, which the kernel closes when the launcher is gone, however it ended.
The parent-death signal of Linux would not do: the parent of a forked worker is Python's fork server, which lives on as long as
any of its children. The kernel itself then kills the worker and all that it has started, whatever they are at: in a
collective, in C++, or stopped. All that workers publish is atomic, so nothing is lost but the work at hand.
"""

import fcntl
import os
import signal
from multiprocessing.connection import Connection


def end_with(launcher: Connection) -> None:
    """Make this process a session of its own, as Ctrl-C is for the launcher, which ends its workers in good order; and have it
    and all that it starts end when the other end of a pipe, to which nothing is ever written, is closed. The open pipe must be
    this process's alone: it keeps whom to kill."""
    os.setsid()
    pipe = launcher.fileno()
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if launcher.poll(0):  # it was closed before
        os.killpg(os.getpid(), signal.SIGKILL)
