"""Print a pipeline's status, as a table (of 80 columns and more) or as JSON, once or until no job is left."""

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.output import nobody_reads
from megatron_specialm.base.printing import first_of, say
from megatron_specialm.base.process_status import total
from megatron_specialm.base.terminal import console, plain
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.slurm.state import ElementState
from megatron_specialm.slurm.status import StageStatus, Status, Training, read_status

SHOWN_FAILURES = 10
SHOWN_NODES = 4
COLOURS = {"running": "cyan", "failed": "red", "lost": "red", "done": "green"}
# Live states first, in the order in which a job passes through them; other states of Slurm come between.
ORDER = ("running", "completing", "configuring", "pending")


def status_view(status: Status) -> RenderableType:
    """A row per stage, and below the table failures and warnings."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1, 0, 0))
    table.add_column("stage", "in all", overflow="fold")
    done, tasks = sum(stage.done for stage in status.stages), sum(stage.tasks for stage in status.stages)
    table.add_column("done", f"{done}/{tasks}", justify="right", no_wrap=True)
    table.add_column("state", overflow="fold", ratio=1)
    plans = [stage.planned_hours for stage in status.stages if stage.planned_hours is not None]
    so_far = sum(stage.device_hours for stage in status.stages)
    table.add_column("GPU h", _hours(so_far or None), justify="right", no_wrap=True)
    table.add_column("plan", _hours(sum(plans) if plans else None), justify="right", no_wrap=True)
    for stage in status.stages:
        state = plain(state_text(stage), style=_colour(stage))
        if stage.trainings:
            state.append(f"\n{training_text(stage.trainings)}", style="default")
        if stage.counts:
            state.append(f"\n{total(stage.counts)}", style="default")
        table.add_row(
            plain(stage.stage),
            f"{stage.done}/{stage.tasks}",
            state,
            _hours(stage.device_hours or None),
            _hours(stage.planned_hours),
        )
    warnings = [plain(f"warning: {warning}") for stage in status.stages for warning in stage.warnings]
    return Group(table, *_failures(status), *warnings)


def status_json(status: Status) -> dict[str, Any]:
    """All that the table shows, with each element and training."""
    stages = [
        {
            **{name: value for name, value in asdict(stage).items() if name != "elements"},
            "state": state_text(stage),
            "elements": [_element(element) for element in stage.elements],
        }
        for stage in status.stages
    ]
    return {"pipeline": status.pipeline, "root": status.root, "time": status.time, "stages": stages}


def state_text(stage: StageStatus) -> str:
    """As `3 running on node[1-2]; 2 pending (JobArrayTaskLimit); 1 not submitted`; without counts for a stage of one task."""
    if stage.done == stage.tasks:
        return "done"
    groups: dict[tuple[str, str], list[ElementState]] = {}
    for element in sorted(stage.elements, key=_order):
        groups.setdefault((element.state, element.reason), []).append(element)
    parts = []
    for (state, reason), elements in groups.items():
        count = f"{len(elements)} " if stage.tasks > 1 else ""
        because = f" ({reason})" if reason else ""
        restarts = sum(element.restarts for element in elements)
        again = f", restarted {restarts}x" if restarts else ""
        parts.append(f"{count}{state}{because}{_nodes(elements)}{again}")
    parts += [f"{count} {word}" if stage.tasks > 1 else word for word, count in stage.waiting.items()]
    return "; ".join(parts)


def training_text(trainings: Sequence[Training]) -> str:
    """Of several trainings: the range of steps, losses and fill, the tokens per second of all, and the end of the last one."""
    steps = _range([training.step for training in trainings], "d")
    longest = max(training.steps for training in trainings)
    losses = [training.loss for training in trainings if training.loss is not None]
    loss = _range(losses, ".3f") if losses else "not finite"
    speed = sum(training.tokens_per_second for training in trainings)
    fills = [training.fill for training in trainings if training.fill is not None]
    fill = f", fill {_range(fills, '.0%')}" if fills else ""
    eta = _clock(max(training.eta_seconds for training in trainings))
    return f"step {steps}/{longest}, loss {loss}, {speed:,.0f} tokens/s{fill}, ETA {eta}"


def _range(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low}-{high}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _order(element: ElementState) -> tuple[int, str, int]:
    known = ORDER.index(element.state) if element.state in ORDER else len(ORDER) - 1 if element.live else len(ORDER)
    return known, element.reason, element.number


def _nodes(elements: Sequence[ElementState]) -> str:
    """The nodes of live elements; those of failures are below the table."""
    nodes = dict.fromkeys(element.nodes for element in elements if element.live and element.nodes)
    if not nodes:
        return ""
    return f" on {first_of(list(nodes), SHOWN_NODES)}"


def _colour(stage: StageStatus) -> str:
    words = ["done"] if stage.done == stage.tasks else [element.state for element in stage.elements]
    return next((colour for state, colour in COLOURS.items() if state in words), "default")


def _hours(hours: float | None) -> str:
    if hours is None:
        return "-"
    if hours < 0.005:
        return "<0.01"
    return f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"


def _failures(status: Status) -> list[RenderableType]:
    """Whole lines, which a terminal may break but a reader can copy."""
    failures = [failure for stage in status.stages for failure in stage.failures]
    shown: list[RenderableType] = []
    for failure in failures[:SHOWN_FAILURES]:
        where = f" on {failure.nodes}" if failure.nodes else ""
        shown.append(plain(f"{', '.join(failure.tasks)}: job {failure.job}{where}: {failure.state}", style="red"))
        shown.append(plain(f"  {failure.error}\n  log: {failure.log}", overflow="fold"))
    if len(failures) > SHOWN_FAILURES:
        shown.append(plain(f"and {len(failures) - SHOWN_FAILURES} more failures: --json lists them all"))
    return shown


def _element(element: ElementState) -> Mapping[str, Any]:
    return {
        "job": element.slurm_name,
        "name": element.job.name,
        "submission": element.job.submission,
        "tasks": [task.key for task in element.job.elements[element.number]],
        "ranks": element.job.ranks,
        "state": element.state,
        "reason": element.reason,
        "nodes": element.nodes,
        "restarts": element.restarts,
        "seconds_left": element.seconds_left,
        "attempts": [asdict(attempt) for attempt in element.attempts],
    }


def watch_status(pipeline: Pipeline, *, as_json: bool, seconds: float) -> None:
    """Print it every so many seconds until no job is queued or running, or Ctrl-C. A terminal shows the newest table only.
    A controller that does not answer is asked again.

    Raises:
        ArtifactError: a record in the run folder is damaged.
    """
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                status = read_status(pipeline)
            except MachineError as error:
                say(f"{error}; looking again", error=True)
            else:
                if not as_json and sys.stdout.isatty():
                    console().clear()
                show_status(status, as_json=as_json)
                if not status.is_live or nobody_reads():
                    return
            time.sleep(seconds)


def show_status(status: Status, *, as_json: bool) -> None:
    """Print it once."""
    if as_json:
        say(json.dumps(status_json(status)))
    else:
        console().print(status_view(status))
