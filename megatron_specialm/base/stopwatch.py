"""How long work takes: sums of what passes between two looks, never negative.

The monotonic clock is no part of the date, so setting that back or ahead changes nothing. But the clock itself may start anew
under a process that is moved to another machine, or be shifted by a library; then what has passed between two looks is not
known, and counts as nothing. Each look costs less than a microsecond: the more there are, the less is lost.
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
