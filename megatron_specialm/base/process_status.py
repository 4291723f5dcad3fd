"""Where this process stands, for whoever watches it, and whether it has been asked to stop.

Asking is a signal: SIGTERM, SIGUSR1 and SIGHUP, of a terminal that was closed, mean the same. Python runs a handler between
two bytecodes of the main thread, so a signal that comes while the main thread waits in a collective or in C++ takes effect when
that call returns; none is lost.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from megatron_specialm.base.errors import Stopped


@contextlib.contextmanager
def hearing(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Within, a handler hears these signals. SIGHUP stays ignored where nohup has begun this process. Main thread only."""
    heard = [number for number in numbers if number is not signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


class ProcessStatus:
    """What a process tells its watchers, and what it does when it is asked to stop: end at once with `Stopped`, or inside
    `at_step_boundaries` finish the step first.

    `progress` counts steps and batches; None says that nobody can tell by it whether the work goes on. `step` is the
    training step, if there is one.
    """

    def __init__(self) -> None:
        self.activity = "starting"
        self.progress: int | None = None
        self.step: int | None = None
        self.stop_asked_by: str | None = None
        self._patient = False

    def begin(self, activity: str) -> None:
        """Something else begins, of which there is no progress to tell yet."""
        self.activity, self.progress, self.step = activity, None, None

    def beat(self, *, step: int | None = None) -> None:
        """The work goes on. Cheap enough for every batch."""
        self.progress = (self.progress or 0) + 1
        if step is not None:
            self.step = step

    def ask_to_stop(self, by: str) -> None:
        """Called in the main thread. Only the first request counts: a second one must not disturb the ending.

        Raises:
            Stopped: the work at hand has no step boundaries.
        """
        if self.stop_asked_by is None:
            self.stop_asked_by = by
            if not self._patient:
                self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Between two pieces of work.

        Raises:
            Stopped: it was asked to.
        """
        if self.stop_asked_by is not None:
            raise Stopped(f"stopped by {self.stop_asked_by} while {self.activity}: the same command does it again")

    @contextlib.contextmanager
    def at_step_boundaries(self) -> Iterator[None]:
        """Within, a request to stop is only noted; the work looks at `stop_asked_by` where it can end well."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    @contextlib.contextmanager
    def hearing_signals(self) -> Iterator[None]:
        """Within, the stop signals are requests to stop. Main thread only."""

        def ask(number: int, _frame: FrameType | None) -> None:
            self.ask_to_stop(signal.Signals(number).name)

        with hearing(ask, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            yield
