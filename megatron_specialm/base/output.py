"""Standard output and errors that may end before the process does: a pipe whose reader has gone, a terminal that hung up, a
log on a full disk.

What a run prints is news of its work, not the work: it is dropped where nobody can take it, and the run goes on. A command
whose work is what it prints ends well only where a reader chose to read no further.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

UNREAD = (errno.EPIPE, errno.EIO)  # the reader of a pipe is gone; the terminal is


class _Channel(io.FileIO):
    """A file descriptor on which writing does not fail where what is written may be lost."""

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
                self._may_be_lost = True  # it is said once
                raise OSError(error.errno, error.strerror, "standard output") from None
            return memoryview(data).nbytes
        # None: the reader is slow, and has asked not to be waited for.
        return memoryview(data).nbytes if written is None and self._may_be_lost else written


class _Output(io.TextIOWrapper):
    """Text for a descriptor. Names of files need not be text, and a locale may have no letters but English ones."""

    def __init__(self, descriptor: int, *, encoding: str, may_be_lost: bool) -> None:
        self.channel = _Channel(descriptor, may_be_lost=may_be_lost)
        buffer = io.BufferedWriter(self.channel)
        super().__init__(buffer, encoding=encoding, errors="backslashreplace", line_buffering=True)


@contextlib.contextmanager
def lasting_output(*, may_be_lost: bool) -> Iterator[None]:
    """Within, printing fails nobody, with one exception: where the standard output may not be lost and somebody reads it, it
    raises OSError as soon as it cannot be written, as on a full disk."""
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
    """A stream of ours in the place of Python's own; somebody else's, as a test's, is left alone."""
    if stream is None:  # closed when Python started
        return _Output(descriptor, encoding="utf-8", may_be_lost=may_be_lost)
    try:
        ours = stream.fileno() == descriptor
    except (OSError, ValueError):  # it has no descriptor
        return stream
    return _Output(descriptor, encoding=stream.encoding, may_be_lost=may_be_lost) if ours else stream


def nobody_reads() -> bool:
    """Whether the reader of the standard output has gone: what goes on only to print may end."""
    return isinstance(sys.stdout, _Output) and sys.stdout.channel.is_unread


def _give_descriptors() -> None:
    """Open what was closed of standard input, output and errors: the next file that is opened would become it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
