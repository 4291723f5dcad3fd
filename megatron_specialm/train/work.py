"""What a training has cost so far: the passes really made and the seconds, those of lost attempts included.

    work.json   written over in place after every step and every validation batch of the first process

A few bytes in one write, without waiting for the disk: what a killed process has written stays, so at most the step that
it was at is missing. Where the machine itself is lost, what its kernel had not written out yet is missing too.
"""

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_specialm.base.files import read_json
from megatron_specialm.base.shapes import Seconds
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.estimate.setup import Passes

FILE = "work.json"
_WIDTH = 256  # bytes: a shorter text must not leave the end of a longer one


@dataclass(frozen=True)
class Work:
    """Passes of all copies of the model, and wall seconds, over all attempts."""

    passes: Passes = field(default_factory=Passes)
    seconds: Seconds = 0.0

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What stands in a folder; nothing where no attempt has come to its first step, or a machine was lost before what it
        wrote came to the disk, which leaves zeros or nothing in the file.

        Raises:
            ArtifactError: something else stands there.
        """
        path = folder / FILE
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes().strip(b"\0"):
                return read_json(path, cls, remedy="remove it: what earlier attempts have cost is then not counted")
        return cls()


class WorkRecord:
    """Keeps `work.json` of a training, on its first process."""

    def __init__(self, folder: Path, *, copies: int, watch: Stopwatch) -> None:
        """Go on from what former attempts have left.

        Args:
            copies: data-parallel copies of the model: each makes as many passes as the first one.
            watch: of this attempt.
        """
        self._before, self._data_parallel_group, self._watch = Work.read(folder), copies, watch
        self._file = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT, 0o666)

    def write(self, passes: Passes) -> Work:
        """Note what has been done by now, over all attempts, and say it.

        Args:
            passes: those of one copy since this attempt began.
        """
        all_passes = self._before.passes.plus(passes, times=self._data_parallel_group)
        work = Work(all_passes, self._before.seconds + self._watch.seconds)
        text = json.dumps({"passes": work.passes._asdict(), "seconds": work.seconds})
        os.pwrite(self._file, text.ljust(_WIDTH).encode(), 0)
        return work

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)
