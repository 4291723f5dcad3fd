"""The passes and seconds that a training has used so far, including those of lost attempts.

    work.json   overwritten in place by rank 0 after every step and every validation batch

A record is a few bytes in one write without fsync. It survives a killed process, so at most the current step is missing. If
the machine fails, records that its kernel has not yet written to the disk are lost too.
"""

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from megatron_specialm.base.files import read_json
from megatron_specialm.base.shapes import Seconds
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.estimate.setup import Passes

FILE = "work.json"
_WIDTH = 512  # bytes of a padded record: a shorter text must not leave the end of a longer one


@dataclass(frozen=True)
class Work:
    """Passes over all data-parallel copies, and wall seconds, over all attempts."""

    passes: Passes = field(default_factory=Passes)
    seconds: Seconds = 0.0

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record in a folder. It is zero if no attempt has finished a step, or if a failed machine has left the file empty
        or filled with zeros.

        Raises:
            ArtifactError: the file has other content.
        """
        path = folder / FILE
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes().strip(b"\0"):
                return read_json(path, cls, remedy="remove it: what earlier attempts have cost is then not counted")
        return cls()


class WorkRecord:
    """Writes a training's `work.json`, on rank 0."""

    def __init__(self, folder: Path, *, watch: Stopwatch) -> None:
        """Add to the record of earlier attempts.

        Args:
            watch: runs since this attempt began.
        """
        self._before, self._watch = Work.read(folder), watch
        self._file = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT, 0o666)

    def write(self, passes: Passes) -> Work:
        """Write and return the work so far, over all attempts.

        Args:
            passes: of all copies since this attempt began.
        """
        work = Work(self._before.passes.plus(passes), self._before.seconds + self._watch.seconds)
        text = json.dumps({"passes": work.passes._asdict(), "seconds": work.seconds})
        os.pwrite(self._file, text.ljust(_WIDTH).encode(), 0)
        return work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file)
        os.close(self._file)
