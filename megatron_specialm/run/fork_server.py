"""Imported first by the server that workers are forked from: it ends with its launcher, even while it imports the rest, which
takes seconds. Workers see to themselves: what the kernel is told here is not inherited."""

import contextlib
import ctypes
import signal

PR_SET_PDEATHSIG = 1  # Linux

with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
