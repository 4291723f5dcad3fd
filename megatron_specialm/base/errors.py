"""The errors for users.

Each names the file, key and value that are wrong, and what to do. The command line prints it without a traceback and exits with
`exit_code`. Any other exception is a bug of this program and keeps its traceback.
"""

import contextlib
import errno
import traceback
from collections.abc import Iterator
from pathlib import PurePath


class SpecialmError(ValueError):
    """Base of all errors of the input or the machine."""

    exit_code = 2


class ConfigError(SpecialmError):
    """A config that cannot be run: unknown key, wrong type, cycle, missing stage."""


class DataError(SpecialmError):
    """Text that cannot be read or is too little: bad JSON, not UTF-8, empty corpus, fewer windows than a batch."""


class MissingTextError(DataError):
    """A file of text that a config names does not exist."""


class ArtifactError(SpecialmError):
    """An artifact on disk that is missing, incomplete, damaged, or made for something else."""


class CheckpointError(ArtifactError):
    """A checkpoint that does not verify or does not fit the model."""


class MachineError(SpecialmError):
    """The machine does not allow it: no device, port in use, no write permission, full disk."""

    exit_code = 3


class TrainingError(SpecialmError):
    """Training cannot go on: the loss is not finite, or a rank has died."""

    exit_code = 4


class UnconfirmedError(SpecialmError):
    """Finished work would be made again, at a cost that needs a confirmation."""


class Stopped(SpecialmError):
    """This process has stopped in order, as a signal or its supervisor asked. The same command continues."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


_REFUSALS = {
    errno.ENOSPC: "the disk is full: free space there, or choose another place; the same command goes on",
    errno.EDQUOT: "the disk quota is used up: free space there, or choose another place; the same command goes on",
    errno.EACCES: "no permission: change that, or choose another place",
    errno.EPERM: "no permission: change that, or choose another place",
    errno.EROFS: "the filesystem is read-only: choose another place",
    errno.ENAMETOOLONG: "the name is too long for the filesystem: choose a shorter one",
    errno.ENOTDIR: "a file stands where a folder is needed: remove it, or choose another place",
    errno.EEXIST: "something of that name is there already: remove it, or choose another place",
    errno.EISDIR: "a folder stands where a file is needed: remove it, or choose another place",
    errno.EFBIG: "larger than files may be here: raise `ulimit -f`, or choose another place",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
}


@contextlib.contextmanager
def machine_errors() -> Iterator[None]:
    """Raise errors of the operating system as `MachineError`, with what to do. Where such an error names no file, the message
    names the line of code that raised it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        where = error.filename if error.filename is not None else f"a file that {_caller(error)} works on"
        raise MachineError(f"{where}: {_REFUSALS[error.errno]} ({error.strerror})") from None


def _caller(error: OSError) -> str:
    """The code that raised an error, as `folder/file.py:line function`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(PurePath(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
