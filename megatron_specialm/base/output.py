"""Standard output and standard error that may fail before the process ends: a closed pipe, a closed terminal, a full disk.

A run drops output that cannot be written and continues. A command whose purpose is its output fails, unless the reader of its
pipe or terminal is gone.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

UNREAD = (errno.EPIPE, errno.EIO)  # a pipe without a reader; a closed terminal


class _Channel(io.FileIO):
    """A file descriptor; a failing write is ignored if the output may be lost, or if the reader is gone."""

    def __init__(self, descriptor: int, *, may_be_lost: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._may_be_lost = may_be_lost
        self.is_unread = False

    def write(self, data) -> int | None:  # type: ignore[no-untyped-def, override]
        try:
            written = super().write(data)
        except OSError as error:
            self.is_unread |= error.errno in UNREAD
            if not self._may_be_lost and not self.is_unread:
                self._may_be_lost = True  # raised once
                raise OSError(error.errno, error.strerror, "standard output") from None
            return memoryview(data).nbytes
        # None: a non-blocking descriptor whose reader is slow.
        return memoryview(data).nbytes if written is None and self._may_be_lost else written


class _Output(io.TextIOWrapper):
    """A text stream on a descriptor. Characters that the encoding lacks, as in file names, are written as escapes."""

    def __init__(self, descriptor: int, *, encoding: str, may_be_lost: bool) -> None:
        self.channel = _Channel(descriptor, may_be_lost=may_be_lost)
        buffer = io.BufferedWriter(self.channel)
        super().__init__(buffer, encoding=encoding, errors="backslashreplace", line_buffering=True)


@contextlib.contextmanager
def lasting_output(*, may_be_lost: bool) -> Iterator[None]:
    """Within, printing does not raise, with one exception: if `may_be_lost` is false and there is a reader, a failing write to
    standard output raises OSError, as on a full disk."""
    _give_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout = _lasting(sys.stdout, 1, may_be_lost=may_be_lost)
    sys.stderr = _lasting(sys.stderr, 2, may_be_lost=True)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None, descriptor: int, *, may_be_lost: bool) -> TextIO:
    """A replacement for Python's own stream. Other streams, such as a test's, are returned unchanged."""
    if stream is None:  # it was closed when Python started
        return _Output(descriptor, encoding="utf-8", may_be_lost=may_be_lost)
    try:
        ours = stream.fileno() == descriptor
    except (OSError, ValueError):  # it has no file descriptor
        return stream
    return _Output(descriptor, encoding=stream.encoding, may_be_lost=may_be_lost) if ours else stream


def nobody_reads() -> bool:
    """Whether standard output has no reader: a command that only prints may end."""
    return isinstance(sys.stdout, _Output) and sys.stdout.channel.is_unread


def _give_descriptors() -> None:
    """Open descriptors 0, 1 and 2 if they are closed: otherwise the next opened file would get their number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
