"""A stopwatch: the sum of the differences between readings of the monotonic clock, none of them negative.

Setting the date does not affect the monotonic clock. But it may restart when a process is moved to another machine, or a
library may shift it. Then the time between two readings is unknown and counts as zero, so frequent readings lose less. A
reading takes less than a microsecond.
"""

import time


class Stopwatch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds = self._lap = 0.0

    @property
    def seconds(self) -> float:
        """Wall seconds since it was made."""
        now = time.monotonic()
        self._seconds += max(0.0, now - self._last)
        self._last = now
        return self._seconds

    def lap(self) -> float:
        """Wall seconds since the last call, or since it was made."""
        before, self._lap = self._lap, self.seconds
        return self._lap - before
