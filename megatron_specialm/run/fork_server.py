"""Imported first by the server from which workers are forked: the server ends with its launcher, also during its other imports,
which take seconds. Workers do not inherit this setting; `processes.py` has theirs."""

import contextlib
import ctypes
import signal

PR_SET_PDEATHSIG = 1  # Linux

with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
