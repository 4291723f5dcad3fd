"""A plan as a table: a line per stage, or a line per task."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.artifacts import artifact_folder, read_marker
from megatron_specialm.base.terminal import Column, Table, number, word
from megatron_specialm.graph.plan import Plan, PlannedTask
from megatron_specialm.graph.redo import Redo, device_time
from megatron_specialm.graph.tasks import TaskId

SHOWN_REASONS = 2  # of a stage's
NOTE = "spent and redo (about): device time, which is wall time times processes"


@dataclass(frozen=True)
class _TaskRow:
    """A task of the plan, and the device-seconds of its finished work; `redo`: about those of repeating stale work."""

    planned: PlannedTask
    redo: Redo | None
    spent: float

    @property
    def redo_seconds(self) -> float:
        return self.redo.seconds if self.redo else 0


def stage_table(plan: Plan, redo: Mapping[TaskId, Redo], root: Path) -> Table:
    """The tasks of each stage by state, the cost of the finished ones, and why some are stale."""
    stages: dict[str, list[_TaskRow]] = {}
    for row in _rows(plan, redo, root):
        stages.setdefault(row.planned.task.id.stage, []).append(row)
    columns: list[Column[list[_TaskRow]]] = [
        word("stage", lambda rows: rows[0].planned.task.id.stage),
        word("tasks", _states),
        word("because", _reasons),
        number("spent", lambda rows: _time(sum(row.spent for row in rows))),
        number("redo", lambda rows: _time(sum(row.redo_seconds for row in rows))),
    ]
    return Table.of(stages.values(), columns, note=NOTE, cut="because")


def task_table(plan: Plan, redo: Mapping[TaskId, Redo], root: Path) -> Table:
    """Each task: its state, the domain that pays for it, its inputs, and why it is stale."""
    columns: list[Column[_TaskRow]] = [
        word("task", lambda row: str(row.planned.task.id)),
        word("state", lambda row: f"done in {row.planned.elsewhere}" if row.planned.elsewhere else row.planned.state),
        word("charged to", lambda row: row.planned.task.domain or "generic"),
        word("reads", lambda row: ", ".join(map(str, row.planned.task.inputs))),
        word("because", lambda row: str(row.redo.reasons) if row.redo else ""),
        number("spent", lambda row: _time(row.spent)),
        number("redo", lambda row: _time(row.redo_seconds)),
    ]
    return Table.of(_rows(plan, redo, root), columns, note=NOTE)


def _rows(plan: Plan, redo: Mapping[TaskId, Redo], root: Path) -> Iterator[_TaskRow]:
    for name, planned in plan.items():
        if name in redo:
            spent = redo[name].spent
        else:
            marker = read_marker(artifact_folder(root, *name, planned.digest)) if planned.state == "done" else None
            spent = marker.whole_cost.device_seconds if marker is not None else 0.0
        yield _TaskRow(planned, redo.get(name), spent)


def _states(rows: Sequence[_TaskRow]) -> str:
    states = Counter(row.planned.state for row in rows)
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _reasons(rows: Sequence[_TaskRow]) -> str:
    reasons = list(dict.fromkeys(row.redo.reasons.by_stage() for row in rows if row.redo))
    more = f"; and {len(reasons) - SHOWN_REASONS} more" if len(reasons) > SHOWN_REASONS else ""
    return "; ".join(reasons[:SHOWN_REASONS]) + more


def _time(seconds: float) -> str:
    return device_time(seconds) if seconds else ""
