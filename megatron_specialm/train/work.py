"""What a training has cost so far: the passes really made and the seconds, those of lost attempts included.

    work.json   written over in place after every step and every validation batch of the first process

A few bytes in one write, without waiting for the disk: what a killed process has written stays, so at most the step that
it was at is missing. Where the machine itself is lost, what its kernel had not written out yet is missing too.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.config.setup import Passes

FILE = "work.json"
_WIDTH = 256  # bytes: a shorter text must not leave the end of a longer one


@dataclass(frozen=True)
class Work:
    """Passes of all copies of the model, and wall seconds, over all attempts."""

    passes: Passes = field(default_factory=Passes)
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What stands in a folder; nothing where no attempt has come to its first step, or a machine was lost before."""
        try:
            found: Mapping[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
            seconds = found["seconds"]  # versions before this one may have left what a clock set back made of it
            return cls(Passes(**found["passes"]), seconds if 0 <= seconds < math.inf else 0.0)
        except (OSError, ValueError, KeyError, TypeError):
            return cls()


class WorkRecord:
    """Keeps `work.json` of a training, on its first process."""

    def __init__(self, folder: Path, *, copies: int, watch: Stopwatch) -> None:
        """Go on from what former attempts have left.

        Args:
            copies: data-parallel copies of the model: each makes as many passes as the first one.
            watch: of this attempt.
        """
        self._before, self._copies, self._watch = Work.read(folder), copies, watch
        self._file = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT, 0o666)

    def write(self, passes: Passes) -> None:
        """Note what has been done by now.

        Args:
            passes: those of one copy since this attempt began.
        """
        all_passes = self._before.passes.plus(passes, times=self._copies)
        seconds = self._before.seconds + self._watch.seconds
        text = json.dumps({"passes": all_passes._asdict(), "seconds": seconds})
        os.pwrite(self._file, text.ljust(_WIDTH).encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)
