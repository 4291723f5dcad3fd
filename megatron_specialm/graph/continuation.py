"""How much of a training is left where it can continue from an earlier one that differs in its length only. This predicts from
settings and markers what `stages/continuing.py` will find."""

from collections.abc import Iterator
from pathlib import Path

from megatron_specialm.base.artifacts import artifact_folders, read_label, read_marker
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.config.schedule import step_to_keep
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.graph.length import at_length, but_for_length, last_step, why_another_step
from megatron_specialm.graph.lineage import train_stages
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.rates import at_rate, trial_key, trial_of


def fraction_to_do(pipeline: Pipeline, planned: PlannedTask, root: Path) -> float:
    """The fraction of a training's steps that it cannot take over from a finished training of another length. It is 1 for other
    tasks, and where the number of steps depends on the data."""
    stage = train_stages(pipeline).get(planned.task.id.stage)
    if stage is None or stage.steps_follow_data:
        return 1.0
    rate = planned.task.rate
    ours = at_rate(stage, stage.optimizer.rates[0]) if rate is None else trial_of(stage, rate)
    last = last_step(ours)
    shared = (
        step
        for steps, theirs in _finished(ours, stage, planned, root)
        for step in (steps, step_to_keep(theirs) or 0)
        if step <= last and why_another_step(step, ours, theirs) is None
    )
    return 1 - max(shared, default=0) / last


def _finished(
    ours: TrainStage, stage: TrainStage, planned: PlannedTask, root: Path
) -> Iterator[tuple[int, TrainStage]]:
    """The finished trainings that differ in their length only: the steps that each made, and its settings."""
    name = planned.task.id
    rates = stage.optimizer.rates if planned.task.rate is None else []
    trials = {f"{name.stage}/{trial_key(name.key, rate)}" for rate in rates}
    for folder in artifact_folders(root, *name):
        try:
            made_from, marker = read_label(folder)["made_from"], read_marker(folder)
        except ArtifactError:  # `stages/continuing.py` does not use it either
            continue
        if not made_from or marker is None or marker.digest == planned.digest:
            continue
        if but_for_length(made_from, trials) == but_for_length(planned.made_from, trials):
            yield marker.values.get("steps", 0), at_length(ours, made_from["settings"])
