"""The progress that a run shows: a live bar per task on a terminal; elsewhere lines for tasks that take long."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import parse_json
from megatron_specialm.base.process_status import minutes, read_count
from megatron_specialm.base.terminal import plain
from megatron_specialm.graph.tasks import TaskId

PLAIN_SECONDS = 15.0  # between two lines about one task where there is no terminal


@dataclass(frozen=True)
class StepRecord:
    """The fields that are shown of a record in `metrics.jsonl`. `loss` is None where it is not finite; `fill` is missing in
    records of earlier versions."""

    step: int
    steps: int
    loss: float | None
    tokens_per_second: float
    eta_seconds: float
    mfu: float | None
    fill: float | None = None


class TaskProgress:
    """The display of a run of `total` tasks."""

    def __init__(self, total: int, *, console: Console) -> None:
        self._console, self._total, self._done = console, total, 0
        self._bars = Bars(
            _folded("{task.description}"), BarColumn(bar_width=12), _folded("{task.fields[state]}"), TimeElapsedColumn(),
            console=console, disable=not console.is_interactive, transient=True,
        )  # fmt: skip
        self._rows: dict[TaskId, TaskID] = {}
        self._printed: dict[TaskId, float] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def started(self, name: TaskId) -> None:
        """A task's workers have been started."""
        self._rows[name] = self._bars.add_task(str(name), total=None, state="")
        self._printed[name] = time.monotonic()

    def finished(self, name: TaskId, *, seconds: float, error: str | None) -> None:
        """A task has ended."""
        self._bars.remove_task(self._rows.pop(name))
        self._done += error is None
        line = plain(f"[{self._done:>3}/{self._total}] {name}: ")
        if error:  # at once: tasks that do not depend on it may go on for days
            line.append("failed", style="red").append(f" after {seconds:.0f} s: {error.splitlines()[0]}")
        else:
            line.append(f"done in {seconds:.0f} s")
        self._console.print(line)

    def update(self, folders: Mapping[TaskId, Path]) -> None:
        """Read the progress of running tasks from their folders."""
        for name, folder in folders.items():
            if (found := _position(folder)) is None:
                continue
            done, of, state, line = found
            self._bars.update(self._rows[name], total=of, completed=done, state=state)
            if not self._console.is_interactive and time.monotonic() - self._printed[name] >= PLAIN_SECONDS:
                self._printed[name] = time.monotonic()
                self._console.print(f"          {name}: {line}", highlight=False)


def _position(folder: Path) -> tuple[int, int | None, str, str] | None:
    """The progress of a task, its total, and the text beside a bar and in a line; None where there is no record yet."""
    if (record := last_record(folder / "metrics.jsonl")) is not None:
        state = _describe(record)
        return record.step, record.steps, state, f"step {record.step}/{record.steps} {state}"
    count = read_count(folder)
    return None if count is None else (count.done, count.of, str(count), str(count))


def _folded(text: str) -> TextColumn:
    """Text that is folded, so that no number is cut."""
    return TextColumn(text, table_column=Column(overflow="fold"), markup=False)


def _describe(record: StepRecord) -> str:
    loss = "not finite" if record.loss is None else f"{record.loss:.3f}"
    fill = "" if record.fill is None else f", fill {record.fill:.0%}"
    mfu = "" if record.mfu is None else f", MFU {record.mfu:.0%}"
    return f"loss {loss}, {record.tokens_per_second:,.0f} tokens/s{fill}{mfu}, {minutes(record.eta_seconds)} left"


def last_record(path: Path) -> StepRecord | None:
    """The newest record in a training's `metrics.jsonl`; None where there is none yet. It is for display: a damaged line, as a
    kill leaves one, is ignored."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        with contextlib.suppress(ArtifactError):
            return parse_json(line, StepRecord, path=path)
    return None
