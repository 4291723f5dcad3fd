"""How far work without steps is: told in the log, to the heartbeat, in the task's folder and by `specialm run`; then gone."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from megatron_specialm.base import process_status as counting
from megatron_specialm.base.process_status import PROGRESS, Count, ProcessStatus, counted, read_count, total
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run import progress
from megatron_specialm.run.progress import TaskProgress


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every item is told of."""
    monkeypatch.setattr(counting, "COUNT_SECONDS", 0.0)


@pytest.mark.usefixtures("always")
def test_it_is_told_everywhere_and_gone_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    process_status = ProcessStatus()
    process_status.begin("working on vectors/generic")
    items = counted([[0] * 500, [0] * 500, [0] * 250], tmp_path, process_status, unit="windows", of=1250, size=len)
    assert [len(next(items)) for _ in range(3)] == [500, 500, 250], "the items are what they were"
    count = read_count(tmp_path)
    assert count is not None and (count.done, count.of, count.unit) == (1000, 1250, "windows")
    assert count.seconds_left == pytest.approx(250 / count.per_second)
    assert "working on vectors/generic: 1,000 of 1,250 windows, " in caplog.text and " left" in caplog.text
    assert process_status.activity.startswith("working on vectors/generic: 1,000 of 1,250 windows, ")
    assert process_status.progress is None, "a slow batch is no hang"
    assert list(items) == [] and not (tmp_path / PROGRESS).exists() and read_count(tmp_path) is None
    assert process_status.activity == "working on vectors/generic"


@pytest.mark.usefixtures("always")
def test_it_is_gone_after_an_error_too(tmp_path: Path) -> None:
    def documents() -> Iterator[str]:
        yield from ("one", "two")
        raise ValueError("no JSON")

    process_status = ProcessStatus()
    with pytest.raises(ValueError, match="no JSON"):
        list(counted(documents(), tmp_path, process_status, unit="characters"))
    assert not (tmp_path / PROGRESS).exists() and process_status.activity == "starting"


def test_what_is_done_soon_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in counted(range(3), tmp_path, ProcessStatus(), unit="iterations", of=3):
        assert not list(tmp_path.iterdir())
    assert not caplog.text


def test_words() -> None:
    assert str(Count(12_000, 50_000, "windows", 812.3, 46.8)) == "12,000 of 50,000 windows, 812 per second, 0:47 left"
    assert str(Count(7, None, "characters", 0.25, None)) == "7 characters, 0.25 per second"
    both = total([Count(3, 10, "windows", 2.0, 3.5), Count(5, 20, "windows", 1.0, 15.0)])
    assert str(both) == "8 of 30 windows, 3 per second, 0:15 left"
    assert total([Count(3, 10, "characters", 2.0, 3.5), Count(5, None, "characters", 1.0, None)]).of is None


@pytest.mark.usefixtures("always")
def test_a_run_says_it_in_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    output = io.StringIO()
    name = TaskId("vectors", "generic")
    items = counted(range(4), tmp_path, ProcessStatus(), unit="windows", of=4)
    with TaskProgress(1, console=Console(file=output, width=200)) as shown:
        shown.started(name)
        shown.update({name: tmp_path})  # nothing is told yet
        next(items), next(items)
        shown.update({name: tmp_path})
    assert "vectors/generic: 1 of 4 windows, " in output.getvalue()
