"""How far work without steps is: said every now and then in the log and to whoever hears the heartbeat, and left for those who
look into the task's folder.

    progress.json   done, of, unit, per_second, seconds_left; there while the work goes on
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.stopwatch import Stopwatch

FILE = "progress.json"
SECONDS = 10.0  # between two counts
Item = TypeVar("Item")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Count:
    """So many of so many units (None: how many there are is not known before they have been read), and how fast since the
    beginning."""

    done: int
    of: int | None
    unit: str
    per_second: float
    seconds_left: float | None

    def __str__(self) -> str:
        of = "" if self.of is None else f" of {self.of:,}"
        speed = f"{self.per_second:,.0f}" if self.per_second >= 10 else f"{self.per_second:.2g}"
        left = "" if self.seconds_left is None else f", {minutes(self.seconds_left)} left"
        return f"{self.done:,}{of} {self.unit}, {speed} per second{left}"


def counted(
    items: Iterable[Item],
    folder: Path,
    process_status: ProcessStatus,
    *,
    unit: str,
    of: int | None = None,
    size: Callable[[Item], int] = lambda _: 1,
) -> Iterator[Item]:
    """The same items, counted as each has been worked on.

    Args:
        folder: the task's.
        of: how many units all items hold, where that is known.
        size: how many units an item holds.
    """
    activity, watch, told, done = process_status.activity, Stopwatch(), 0.0, 0
    (folder / FILE).unlink(missing_ok=True)  # of an attempt that was killed
    try:
        for item in items:
            yield item
            done += size(item)
            if (now := watch.seconds) - told >= SECONDS:
                told = now
                speed = done / now
                count = Count(done, of, unit, speed, (of - done) / speed if of and speed else None)
                logger.info("%s: %s", activity, count)
                process_status.activity = f"{activity}: {count}"
                with contextlib.suppress(OSError):  # a full disk stops the work itself soon enough
                    write_json(folder / FILE, asdict(count))
    finally:
        process_status.activity = activity
        (folder / FILE).unlink(missing_ok=True)


def read_count(folder: Path) -> Count | None:
    """How far the work in a folder is; None where it has told nothing yet, or is at its end. It is for people to look at, so
    nothing ends because the file is damaged."""
    with contextlib.suppress(ArtifactError):
        return read_json(folder / FILE, Count)
    return None


def together(counts: Sequence[Count]) -> Count:
    """What several tasks of a stage have counted, as one; it ends with the last of them."""
    totals = [count.of for count in counts if count.of is not None]
    left = [count.seconds_left for count in counts if count.seconds_left is not None]
    return Count(
        sum(count.done for count in counts),
        sum(totals) if len(totals) == len(counts) else None,
        counts[0].unit,
        sum(count.per_second for count in counts),
        max(left) if len(left) == len(counts) else None,
    )


def minutes(seconds: float) -> str:
    """As 62:05."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}:{rest:02d}"
