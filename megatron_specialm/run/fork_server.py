"""Imported first by the server from which workers are forked: the server ends with its launcher, also during its other imports,
which take seconds, and by nothing else: without it workers are taken for ended, and killed before they have saved. Ctrl-C, a
closed terminal and `timeout` signal all processes of the launcher's group, so it leads a session of its own; systemd sends
SIGTERM to all processes of a service, so it blocks that. None of this holds for workers; `processes.py` has what does.

What it has imported is exempt from garbage collection in the workers: a collection would copy the pages that they share, and
take longer than many a task."""

import contextlib
import ctypes
import gc
import os
import signal

PR_SET_PDEATHSIG = 1  # Linux
BLOCKED = {signal.SIGTERM, signal.SIGINT}

os.setsid()
signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

os.register_at_fork(before=gc.freeze, after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED))
