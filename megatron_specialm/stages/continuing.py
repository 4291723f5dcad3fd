"""Start a training from a checkpoint of an earlier one that differs only in its length, instead of from first weights.

After the same number of steps, both trainings have the same bits of weights, optimizer and progress: the data order is a
function of the step, a teacher or its cache is an input, and the loop's state is in the checkpoint. The conditions are:

    everything else that the digest covers is equal: settings except `LENGTH` (graph/length.py), seed, inputs, files;
    the learning rates of all steps up to the checkpoint are equal to the last bit (config/schedule.py);
    both trainings validate after that step, or neither does. A training always validates at its end.

The newest checkpoint that meets them is adopted, from a longer or a shorter training: of the same task with earlier settings,
or of the stage that `continues` names. If there is none, the log has the reason.

    earlier.json    in the task's folder: the adopted step, and its cost
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron_specialm.base.artifacts import (
    LABEL,
    Cost,
    Marker,
    Spent,
    artifact_folders,
    read_label,
    read_marker,
)
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json, verify_folder, write_json
from megatron_specialm.checkpoint.adopting import adopt_steps
from megatron_specialm.checkpoint.opening import REMEDY, newest_checkpoint
from megatron_specialm.checkpoint.steps import STATE, saved_steps, step_folder
from megatron_specialm.config.training import TrainStage
from megatron_specialm.data.training_data import TrainingData
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.length import at_length, but_for_length, last_step, why_another_step
from megatron_specialm.graph.lineage import train_stage
from megatron_specialm.graph.rates import trial_names
from megatron_specialm.train.progress import TrainingState

logger = logging.getLogger(__name__)

FILE = "earlier.json"


@dataclass(frozen=True)
class Earlier:
    """The adopted step of an earlier training.

    artifact: that training's folder, relative to the one that this training's folder is in.
    tokens, slots: of its steps up to the adopted one, in whichever task they were made.
    cost: of that training up to the adopted step, or its full cost if the step was its last one.
    """

    artifact: str
    step: int
    tokens: int
    slots: int
    cost: Cost

    @property
    def counted(self) -> Spent:
        """The tokens and slots of the adopted steps, which are not trained on again."""
        return Spent(self.tokens, self.slots)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record in a training's folder, None if it has not adopted a step.

        Raises:
            ArtifactError: the file is damaged.
        """
        if not (folder / FILE).exists():
            return None
        return read_json(folder / FILE, cls, remedy=f"move {folder} away")


@dataclass(frozen=True)
class _State:
    """The values that are read from a checkpoint's state; earlier versions lack some."""

    progress: TrainingState
    learning_rate: float | None = None
    spent: Cost | None = None


@dataclass(frozen=True)
class _Training:
    """A training that differs only in its length: its folder, its `name` (as of `Earlier.artifact`), its resolved settings, and
    its marker if it has finished."""

    folder: Path
    name: str
    settings: TrainStage
    marker: Marker | None


def go_on_from_earlier(stage: TrainStage, reading: TrainingData, context: Context) -> Earlier | None:
    """Adopt the newest step of an earlier training that is also a step of this one and newer than this one's own. Rank 0 calls
    it, after the steps of trials have been adopted.
    Args:
        stage: the settings, at one learning rate.
    """
    folder, noted = context.folder, Earlier.read(context.folder)
    trainings = list(_trainings_of_other_lengths(stage, reading, context))
    if noted is None and not trainings:
        return None
    newest, _ = newest_checkpoint(folder)
    have = int(newest.name.removeprefix("step_")) if newest else 0
    if noted is not None and have >= noted.step:
        return noted
    last = last_step(reading.settings)
    found = [(step, each) for each in trainings for step in saved_steps(each.folder) if have < step <= last]
    refused: set[Path] = set()
    for step, other in sorted(found, key=lambda one: (one[0], one[1].marker is not None), reverse=True):
        try:
            earlier, steps = _candidate(step, other, stage, reading)
        except ArtifactError as error:
            if other.folder not in refused:  # only the newest step of each is logged
                _log(context, f"does not go on from step {step} of", other, f": {error}")
            refused.add(other.folder)
            continue
        write_json(folder / FILE, asdict(earlier))  # before the steps, so that their cost is never lost
        adopt_steps(other.folder, folder, steps)
        _log(context, f"goes on from step {step} of", other)
        return earlier
    (folder / FILE).unlink(missing_ok=True)
    return None


def _log(context: Context, what: str, other: _Training, why: str = "") -> None:
    length = other.settings.steps
    logger.info("%s: %s an earlier training of %d steps (%s)%s", context.task.id, what, length, other.folder, why)


def _trainings_of_other_lengths(stage: TrainStage, reading: TrainingData, context: Context) -> Iterator[_Training]:
    name = context.task.id
    others = [folder for folder in artifact_folders(context.root, *name) if folder != context.folder]
    if (continued := context.task.continues) is not None:
        others.append(context.artifact(*continued))
    if not others:
        return
    trials = trial_names(context.task, train_stage(context.pipeline, name.stage))
    ours = but_for_length(_made_from(context.folder), trials)
    for folder in others:
        try:
            made_from, marker = _made_from(folder), read_marker(folder)
        except ArtifactError as error:
            logger.warning("%s: not looked at, to go on from it: %s", name, error)
            continue
        if but_for_length(made_from, trials) == ours:
            beside = os.path.relpath(folder, context.folder.parent)
            yield _Training(folder, beside, reading.resolve_steps(at_length(stage, made_from["settings"])), marker)


def _made_from(folder: Path) -> dict[str, Any]:
    made_from: dict[str, Any] = read_label(folder)["made_from"]
    if not made_from:
        raise ArtifactError(f"{folder / LABEL}: of an earlier version, which did not say what it was made from")
    return made_from


def _candidate(step: int, other: _Training, stage: TrainStage, reading: TrainingData) -> tuple[Earlier, list[int]]:
    """Describe a step to start from, and list the steps to adopt for it, itself last.

    Raises:
        ArtifactError: it is not a step of this training, or is damaged.
    """
    if why := why_another_step(step, reading.settings, other.settings):
        raise ArtifactError(why)
    verify_folder(step_folder(other.folder, step))
    state = read_json(step_folder(other.folder, step) / STATE, _State, remedy=REMEDY)
    if state.learning_rate != stage.optimizer.peak:
        raise ArtifactError(f"its learning rate is {state.learning_rate!r}, not {stage.optimizer.peak!r}")
    progress, steps = state.progress, [step]
    if progress.best_step not in (None, step):  # even if this training has it: its copy may be damaged
        verify_folder(step_folder(other.folder, progress.best_step))
        steps.insert(0, progress.best_step)
    # Checkpoints of earlier versions, in which all windows were padded, do not have them.
    slots = progress.slots or (step - progress.skipped_steps) * reading.slots_per_step
    return Earlier(other.name, step, progress.tokens, slots, _cost(step, state, other.marker)), steps


def _cost(step: int, state: _State, marker: Marker | None) -> Cost:
    """The cost of a training up to a step, or its full cost if the step was its last one."""
    if marker is not None and marker.values["steps"] == step:
        return marker.whole_cost
    if state.spent is None:
        raise ArtifactError("it is of an earlier version, which did not say what it had cost")
    return state.spent
