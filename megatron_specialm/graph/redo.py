"""Finished work that a run would redo: why, what it took, and whether the user must confirm.

Nothing is lost by redoing: the old artifact stays, and old settings find it again. But a mistyped value must not cost weeks
before it is noticed. Only redoing asks for confirmation, not new work, nor work that was begun for the same digest and
continues.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.artifacts import (
    LABEL,
    artifact_folder,
    artifact_folders,
    artifact_link,
    read_label,
    read_marker,
)
from megatron_specialm.base.errors import ArtifactError, UnconfirmedError
from megatron_specialm.base.integrity import find_damage
from megatron_specialm.base.printing import first_of
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.graph.length import at_length, but_for_length, last_step, shared_steps
from megatron_specialm.graph.lineage import train_stages
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.rates import at_rate, trial_names, trial_of
from megatron_specialm.graph.reasons import Reasons, find_reasons, redo_seconds
from megatron_specialm.graph.tasks import TaskId

SHOWN_KEYS = 4  # keys of a stage that a line names
UNKNOWN = Reasons(["an earlier version made it, which did not write down from what"])


@dataclass(frozen=True)
class Redo:
    """A finished task that is to be redone.

    spent: device-seconds of the finished work, with those of the training that it continued.
    seconds: an estimate of the device-seconds to redo it, less what can be taken over from an earlier training.
    is_begun: whether redoing has begun, so that it only continues.
    """

    reasons: Reasons
    spent: float
    seconds: float
    is_begun: bool


def find_redo(
    pipeline: Pipeline, plan: Mapping[TaskId, PlannedTask], root: Path, tasks: Collection[TaskId] | None = None
) -> dict[TaskId, Redo]:
    """The finished tasks of a plan, or of `tasks`, that are to be redone, in the plan's order.

    Raises:
        ArtifactError: a label or marker is damaged.
    """
    redone = {str(name) for name, planned in plan.items() if planned.is_to_do}
    return {
        name: found
        for name, planned in plan.items()
        if (tasks is None or name in tasks) and (found := _find(pipeline, planned, root, redone)) is not None
    }


def _find(pipeline: Pipeline, planned: PlannedTask, root: Path, redone: Collection[str]) -> Redo | None:
    name, folder = planned.task.id, artifact_folder(root, *planned.task.id, planned.digest)
    there = {"stale": artifact_link(root, *name), "damaged": folder}.get(planned.state)
    marker = read_marker(there) if there is not None else None
    if there is None or marker is None:
        return None
    spent = marker.whole_cost.device_seconds
    if planned.state == "damaged":
        return Redo(Reasons([find_damage(there, marker.files) or "it was damaged"]), spent, spent, is_begun=False)
    is_begun, old = (folder / LABEL).exists(), read_label(there)["made_from"]
    if not old:
        return Redo(UNKNOWN, spent, spent, is_begun)
    reasons = find_reasons(old, planned.made_from, pipeline.stages[name.stage], redone=redone)
    seconds = redo_seconds(old, planned.made_from, spent=spent) * fraction_to_do(pipeline, planned, root)
    return Redo(reasons, spent, seconds, is_begun)


def redo_lines(redo: Mapping[TaskId, Redo]) -> Iterator[str]:
    """Lines that say what is to be redone and why, with tasks of a stage that have the same reason in one line."""
    if not redo:
        return
    spent, seconds = sum(one.spent for one in redo.values()), sum(one.seconds for one in redo.values())
    tasks = "1 finished task" if len(redo) == 1 else f"{len(redo)} finished tasks"
    yield f"{tasks} must be redone: about {device_time(seconds)}; the existing results took {device_time(spent)} and are kept"
    groups: dict[tuple[str, str], list[TaskId]] = {}
    for name, one in redo.items():
        groups.setdefault((name.stage, one.reasons.by_stage()), []).append(name)
    for (stage, because), names in groups.items():
        keys = first_of([name.key for name in names], SHOWN_KEYS)
        what = f"{stage} ({keys}): {because}" if names[1:] else f"{names[0]}: {redo[names[0]].reasons}"
        yield f"  {what}; about {device_time(sum(redo[name].seconds for name in names))}"


def needs_confirmation(redo: Mapping[TaskId, Redo], pipeline: Pipeline) -> bool:
    """Whether redoing it takes more than `ask_above_device_hours` of the config."""
    return _to_confirm(redo) > 3600 * pipeline.ask_above_device_hours


def refuse_unconfirmed(redo: Mapping[TaskId, Redo], pipeline: Pipeline) -> None:
    """Refuse to redo without confirmation: there is no terminal, or the answer was no.

    Raises:
        UnconfirmedError: it takes more than `ask_above_device_hours` of the config.
    """
    if needs_confirmation(redo, pipeline):
        raise UnconfirmedError(
            f"{pipeline.root}: redoing finished work needs about {device_time(_to_confirm(redo))}, more than the "
            f"{pipeline.ask_above_device_hours:g} device-hours that need no confirmation (`ask_above_device_hours`). Nothing "
            "was done: pass `--yes`, or revert the change (`specialm plan` names it) to use the existing results"
        )


def _to_confirm(redo: Mapping[TaskId, Redo]) -> float:
    return sum(one.seconds for one in redo.values() if not one.is_begun)


def device_time(seconds: float) -> str:
    """Device-seconds as text: `36 s`, `12 min` or `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def fraction_to_do(pipeline: Pipeline, planned: PlannedTask, root: Path) -> float:
    """The fraction of a training's steps that it cannot take over from a finished training of another length. It is 1 for other
    tasks, and where the number of steps depends on the data."""
    stage = train_stages(pipeline).get(planned.task.id.stage)
    if stage is None or stage.steps_follow_data:
        return 1.0
    rate = planned.task.rate
    ours = at_rate(stage, stage.optimizer.rates[0]) if rate is None else trial_of(stage, rate)
    shared = (shared_steps(ours, theirs, ended=steps) for steps, theirs in _finished(ours, stage, planned, root))
    return 1 - max(shared, default=0) / last_step(ours)


def _finished(
    ours: TrainStage, stage: TrainStage, planned: PlannedTask, root: Path
) -> Iterator[tuple[int, TrainStage]]:
    """The finished trainings that differ in their length only: the steps that each made, and its settings."""
    trials = trial_names(planned.task, stage)
    for folder in artifact_folders(root, *planned.task.id):
        try:
            made_from, marker = read_label(folder)["made_from"], read_marker(folder)
        except ArtifactError:  # `stages/continuing.py` does not use it either
            continue
        if not made_from or marker is None or marker.digest == planned.digest:
            continue
        if but_for_length(made_from, trials) == but_for_length(planned.made_from, trials):
            yield marker.values.get("steps", 0), at_length(ours, made_from["settings"])
