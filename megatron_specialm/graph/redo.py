"""Finished work that a run would make again: why, what was spent on it, and who agrees to spend it once more.

Nothing is lost by it, as what there is stays and old settings find it again; but a mistyped value must not take weeks to
notice. Only redoing asks: work that was never finished does not, nor what was begun for the same digest and goes on.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.artifacts import LABEL, artifact_folder, read_label, read_marker, view
from megatron_specialm.base.errors import UnconfirmedError
from megatron_specialm.base.integrity import find_damage
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.continuation import part_to_do
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.reasons import Reasons, find_reasons, seconds_anew
from megatron_specialm.graph.tasks import TaskId

SHOWN_KEYS = 4  # of tasks in a row
UNKNOWN = Reasons(["an earlier version made it, which did not write down from what"])


@dataclass(frozen=True)
class Redo:
    """A finished task that is to be made anew.

    spent: device-seconds that the finished work took, with those of what it went on from.
    anew: about how many more it takes, where it goes on from an earlier training for the part that is left.
    is_begun: whether it is being made anew already, and only goes on.
    """

    reasons: Reasons
    spent: float
    anew: float
    is_begun: bool


def find_redo(
    pipeline: Pipeline, plan: Mapping[TaskId, PlannedTask], root: Path, tasks: Collection[TaskId] | None = None
) -> dict[TaskId, Redo]:
    """What of a plan, or of these tasks of it, is finished and to be made anew, in the plan's order.

    Raises:
        ArtifactError: a label or marker is damaged.
    """
    made_anew = {str(name) for name, planned in plan.items() if planned.is_to_do}
    return {
        name: found
        for name, planned in plan.items()
        if (tasks is None or name in tasks) and (found := _find(pipeline, planned, root, made_anew)) is not None
    }


def _find(pipeline: Pipeline, planned: PlannedTask, root: Path, made_anew: Collection[str]) -> Redo | None:
    name, folder = planned.task.id, artifact_folder(root, *planned.task.id, planned.digest)
    there = {"stale": view(root, *name), "damaged": folder}.get(planned.state)
    marker = read_marker(there) if there is not None else None
    if there is None or marker is None:
        return None
    spent = marker.whole_cost.device_seconds
    if planned.state == "damaged":
        return Redo(Reasons([find_damage(there, marker.files) or "it was damaged"]), spent, spent, is_begun=False)
    is_begun, old = (folder / LABEL).exists(), read_label(there)["made_from"]
    if not old:
        return Redo(UNKNOWN, spent, spent, is_begun)
    reasons = find_reasons(old, planned.made_from, pipeline.stages[name.stage], made_anew=made_anew)
    anew = seconds_anew(old, planned.made_from, spent=spent) * part_to_do(pipeline, planned, root)
    return Redo(reasons, spent, anew, is_begun)


def redo_lines(redo: Mapping[TaskId, Redo]) -> Iterator[str]:
    """Lines that say what is to be made anew and why, tasks of a stage with the same reason together; none where nothing is."""
    if not redo:
        return
    spent, anew = sum(one.spent for one in redo.values()), sum(one.anew for one in redo.values())
    tasks = "1 finished task is" if len(redo) == 1 else f"{len(redo)} finished tasks are"
    yield f"{tasks} to be made anew: about {device_time(anew)}; what there is took {device_time(spent)}, and stays"
    groups: dict[tuple[str, str], list[TaskId]] = {}
    for name, one in redo.items():
        groups.setdefault((name.stage, one.reasons.by_stage()), []).append(name)
    for (stage, because), names in groups.items():
        keys = ", ".join(name.key for name in names[:SHOWN_KEYS])
        more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
        said = f"{stage} ({keys}{more}): {because}" if names[1:] else f"{names[0]}: {redo[names[0]].reasons}"
        yield f"  {said}; about {device_time(sum(redo[name].anew for name in names))}"


def needs_a_yes(redo: Mapping[TaskId, Redo], pipeline: Pipeline) -> bool:
    """Whether making it anew costs more than the config lets a run spend unasked."""
    return _to_confirm(redo) > 3600 * pipeline.ask_above_device_hours


def refuse_unconfirmed(redo: Mapping[TaskId, Redo], pipeline: Pipeline) -> None:
    """Where nobody can be asked, or the answer was no.

    Raises:
        UnconfirmedError: it costs more than the config lets a run spend unasked.
    """
    if needs_a_yes(redo, pipeline):
        raise UnconfirmedError(
            f"{pipeline.root}: finished work would be made anew for about {device_time(_to_confirm(redo))}, and above "
            f"{pipeline.ask_above_device_hours:g} device-hours (`ask_above_device_hours`) that takes a yes. Nothing was done: "
            "say `--yes`, or take back what has changed (`specialm plan`), which finds the finished work again"
        )


def _to_confirm(redo: Mapping[TaskId, Redo]) -> float:
    return sum(one.anew for one in redo.values() if not one.is_begun)


def device_time(seconds: float) -> str:
    """Device-seconds for a reader, as `36 s`, `12 min` or `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
