"""A plan as a table: a line per stage, or a line per task."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from megatron_specialm.base.artifacts import artifact_folder, read_marker
from megatron_specialm.base.terminal import Table
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.redo import Redo, device_time
from megatron_specialm.graph.tasks import TaskId

SHOWN_REASONS = 2  # of a stage's
NOTE = "spent and anew (about): device time, which is wall time times processes"


def stage_table(plan: Mapping[TaskId, PlannedTask], redo: Mapping[TaskId, Redo], root: Path) -> Table:
    """The tasks of each stage by state, the cost of the finished ones, and why some are stale."""
    stages: dict[str, list[TaskId]] = {}
    for name in plan:
        stages.setdefault(name.stage, []).append(name)
    lines = []
    for stage, names in stages.items():
        states = Counter(plan[name].state for name in names)
        because = dict.fromkeys(redo[name].reasons.by_stage() for name in names if name in redo)
        more = f"; and {len(because) - SHOWN_REASONS} more" if len(because) > SHOWN_REASONS else ""
        lines.append([
            stage, ", ".join(f"{count} {state}" for state, count in states.items()),
            "; ".join(list(because)[:SHOWN_REASONS]) + more,
            _time(sum(_spent(plan[name], redo, root) for name in names)),
            _time(sum(redo[name].anew for name in names if name in redo)),
        ])  # fmt: skip
    return Table("", ["stage", "tasks", "because", "spent", "anew"], lines, 3, NOTE, cut="because")


def task_table(plan: Mapping[TaskId, PlannedTask], redo: Mapping[TaskId, Redo], root: Path) -> Table:
    """Each task: its state, the domain that pays for it, its inputs, and why it is stale."""
    lines = []
    for name, planned in plan.items():
        one = redo.get(name)
        lines.append([
            str(name), planned.state if planned.there is None else f"done in {planned.there}",
            planned.task.domain or "generic", ", ".join(map(str, planned.task.inputs)),
            str(one.reasons) if one else "", _time(_spent(planned, redo, root)), _time(one.anew if one else 0),
        ])  # fmt: skip
    return Table("", ["task", "state", "cost is", "reads", "because", "spent", "anew"], lines, 5, NOTE)


def _spent(planned: PlannedTask, redo: Mapping[TaskId, Redo], root: Path) -> float:
    """Device-seconds of a task's finished work in the run folder."""
    name = planned.task.id
    if name in redo:
        return redo[name].spent
    marker = read_marker(artifact_folder(root, *name, planned.digest)) if planned.state == "done" else None
    return marker.whole_cost.device_seconds if marker is not None else 0.0


def _time(seconds: float) -> str:
    return device_time(seconds) if seconds else ""
