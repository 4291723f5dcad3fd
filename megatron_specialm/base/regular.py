"""Reading a file that somebody names: a regular one of a size that it can have, or an error at once. A pipe would be waited
for, a device has no end, and a file of gigabytes is none of those that are read whole."""

import errno
import os
import stat
from pathlib import Path


def read_regular(path: Path, *, most_bytes: int) -> bytes:
    """The content of a regular file, or of a link to one.

    Raises:
        OSError: it is missing, cannot be read, is something else, or larger than that.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer is opened at once
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file, but a folder, a pipe or a device", str(path))
    with os.fdopen(descriptor, "rb") as file:
        content = b"" if status.st_size > most_bytes else file.read(most_bytes + 1)
    if max(status.st_size, len(content)) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes:,} bytes, which no such file has", str(path))
    return content
