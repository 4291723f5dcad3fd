"""Durations on a machine whose clock is set, or whose monotonic clock starts anew."""

import time
from pathlib import Path

import pytest

from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.estimate.setup import Passes
from megatron_specialm.train.work import Work, WorkRecord


class Clock:
    """In the place of `time.monotonic`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_what_passes_between_two_looks_is_never_negative(clock: Clock) -> None:
    watch = Stopwatch()
    clock.now += 5
    assert (watch.seconds, watch.lap()) == (5, 5)
    clock.now -= 7200
    assert (watch.seconds, watch.lap()) == (5, 0)
    clock.now += 2
    assert (watch.seconds, watch.lap()) == (7, 2)


def test_setting_the_date_changes_no_duration(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    watch = Stopwatch()
    clock.now += 5
    for date in (0.0, 1e12):
        monkeypatch.setattr(time, "time", lambda date=date: date)
        assert watch.seconds == 5


def test_the_seconds_of_attempts_only_grow(tmp_path: Path, clock: Clock) -> None:
    """Two attempts; the clock jumps back in the first and between them."""
    found = []
    for _ in range(2):
        with WorkRecord(tmp_path, watch=Stopwatch()) as record:
            for jump in (5, -7200, 5):
                clock.now += jump
                record.write(Passes(trained=1))
                found.append(Work.read(tmp_path).seconds)
        clock.now -= 7200
    assert found == [5, 5, 10, 15, 15, 20]
