"""The status of this process: its activity, step and progress, and whether it has been asked to stop.

Work without steps counts what it has done: in the log, in the activity that heartbeats report, and in its task's folder:

    progress.json   done, of, unit, per_second, seconds_left; there while the work goes on

SIGTERM, SIGUSR1 and SIGHUP (of a terminal that was closed) all ask to stop. Python runs a handler between two bytecodes of the
main thread, so a signal that comes while the main thread waits in a collective or in C++ takes effect when that call returns;
none is lost.
"""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from megatron_specialm.base.errors import ArtifactError, Stopped
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.base.stopwatch import Stopwatch

PROGRESS = "progress.json"
COUNT_SECONDS = 10.0  # between two counts
IGNORABLE = (signal.SIGHUP, signal.SIGINT)
ENDING = (signal.SIGTERM, signal.SIGHUP)
Item = TypeVar("Item")

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def handling(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Within, a handler gets these signals. SIGHUP and SIGINT stay ignored where nohup, or a script's `&`, has this process
    ignore them. Main thread only."""
    handled = [number for number in numbers if number not in IGNORABLE or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def ending_as_by_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise KeyboardInterrupt, once: a closed terminal may send SIGHUP twice, and the second must
    not interrupt what the first has begun. Main thread only."""

    def end(*_: object) -> None:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with handling(end, *ENDING):
        yield


@contextlib.contextmanager
def deferring_ends() -> Iterator[None]:
    """Within, Ctrl-C, SIGTERM and SIGHUP wait for the end, where they are raised again. A second Ctrl-C or SIGTERM does not
    wait. Main thread only."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number in received and number != signal.SIGHUP:
            raise KeyboardInterrupt
        received.append(number)

    try:
        with handling(note, signal.SIGINT, *ENDING):
            yield
    finally:
        for number in dict.fromkeys(received):
            signal.raise_signal(number)


class ProcessStatus:
    """What heartbeats report of this process, and what a request to stop does: it raises `Stopped` at once, or inside
    `at_step_boundaries` is only noted, so that the step is finished first.

    `progress` counts steps and batches; None where the work has no such count. `step` is the training step, if there is one.
    """

    def __init__(self) -> None:
        self.activity = "starting"
        self.progress: int | None = None
        self.step: int | None = None
        self.stop_asked_by: str | None = None
        self._at_boundaries = False

    def begin(self, activity: str) -> None:
        """Another activity begins, without progress so far."""
        self.activity, self.progress, self.step = activity, None, None

    def beat(self, *, step: int | None = None) -> None:
        """Count one step or batch. Cheap enough for every batch."""
        self.progress = (self.progress or 0) + 1
        if step is not None:
            self.step = step

    def ask_to_stop(self, by: str) -> None:
        """Called in the main thread. Only the first request counts: a second one must not interrupt the saving.

        Raises:
            Stopped: the current work has no step boundaries.
        """
        if self.stop_asked_by is None:
            self.stop_asked_by = by
            if not self._at_boundaries:
                self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """To be called between two tasks.

        Raises:
            Stopped: this process was asked to stop.
        """
        if self.stop_asked_by is not None:
            raise Stopped(f"stopped by {self.stop_asked_by} while {self.activity}: the same command does it again")

    @contextlib.contextmanager
    def at_step_boundaries(self) -> Iterator[None]:
        """Within, a request to stop is only noted; the loop checks `stop_asked_by` at each step."""
        self._at_boundaries = True
        try:
            yield
        finally:
            self._at_boundaries = False

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Within, SIGTERM, SIGUSR1 and SIGHUP are requests to stop. Main thread only."""

        def ask(number: int, _frame: FrameType | None) -> None:
            self.ask_to_stop(signal.Signals(number).name)

        with handling(ask, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            yield


@dataclass(frozen=True)
class Count:
    """How much of the work is done. `of`: all units, None where their number is not known before they have been read.
    `per_second`: on average since the beginning."""

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
    """The same items, each counted when the next one is asked for.

    Args:
        folder: of the task.
        of: the units of all items, where known.
        size: the units of an item.
    """
    activity, watch, last, done = process_status.activity, Stopwatch(), 0.0, 0
    (folder / PROGRESS).unlink(missing_ok=True)  # of an attempt that was killed
    try:
        for item in items:
            yield item
            done += size(item)
            if (now := watch.seconds) - last >= COUNT_SECONDS:
                last = now
                speed = done / now
                count = Count(done, of, unit, speed, (of - done) / speed if of and speed else None)
                logger.info("%s: %s", activity, count)
                process_status.activity = f"{activity}: {count}"
                with contextlib.suppress(OSError):  # a full disk stops the work itself
                    write_json(folder / PROGRESS, asdict(count))
    finally:
        process_status.activity = activity
        (folder / PROGRESS).unlink(missing_ok=True)


def read_count(folder: Path) -> Count | None:
    """The last count of the work in a folder; None where there is none yet, or the work has ended. It is for display, so a
    damaged file counts as none."""
    with contextlib.suppress(ArtifactError):
        return read_json(folder / PROGRESS, Count)
    return None


def total(counts: Sequence[Count]) -> Count:
    """The counts of several tasks of a stage as one, which ends with the last of them."""
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
