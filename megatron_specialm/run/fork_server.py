"""Imported first by the server from which workers are forked: the server ends with its launcher, also during its other imports,
which take seconds. Workers do not inherit this setting; `processes.py` has theirs.

What it has imported is exempt from garbage collection in the workers: a collection would copy the pages that they share, and
take longer than many a task."""

import contextlib
import ctypes
import gc
import os
import signal

PR_SET_PDEATHSIG = 1  # Linux

with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

os.register_at_fork(before=gc.freeze)
