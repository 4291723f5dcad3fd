"""The length of trainings, and which steps of a training are also steps of another one that differs in its length only."""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_specialm.config.schedule import step_to_keep, steps_at_same_rates
from megatron_specialm.config.training import Schedule, TrainStage

# The settings that only decide when a training ends, the learning rates of its steps, and where its first steps come from.
LENGTH = ("steps", "schedule", "trial_steps", "continues")


def last_step(settings: TrainStage) -> int:
    """The step after which a training ends, unless early stopping ends it before."""
    return min(settings.steps, settings.trial_steps or settings.steps)


def validates_after(step: int, settings: TrainStage) -> bool:
    """Whether a training validates after this step: every `evaluate_every` steps, and at its end."""
    stopping = settings.early_stopping
    return stopping is not None and (step % stopping.evaluate_every == 0 or step >= settings.steps)


def without_length(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a training, as in digest content, that do not depend on its length."""
    return {name: value for name, value in settings.items() if name not in LENGTH}


def but_for_length(made_from: Mapping[str, Any], trials: Collection[str]) -> dict[str, Any]:
    """The digest content of a training (`digest_content` of `graph/digests.py`) without what depends on its length.

    Args:
        trials: its own trials, as `stage/key`, whose digests depend on its length too.
    """
    settings = made_from["settings"]
    of_length = {*trials, f"{settings.get('continues')}/{made_from['key']}"}
    inputs = {name: digest for name, digest in made_from["inputs"].items() if name not in of_length}
    return {**made_from, "settings": without_length(settings), "inputs": inputs}


def at_length(stage: TrainStage, settings: Mapping[str, Any]) -> TrainStage:
    """A training with the length of another one, whose settings are given as in digest content."""
    schedule = Schedule.model_validate(settings.get("schedule", {}))
    return stage.model_copy(update={"steps": settings["steps"], "schedule": schedule})


def why_another_step(step: int, ours: TrainStage, theirs: TrainStage) -> str | None:
    """Why a step of one training is not the same as that of another one, which differs in its length only; None where it is the
    same, to the last bit."""
    same = steps_at_same_rates(ours, theirs, most=step)
    if same < step:
        return (
            f"the learning rates differ from step {same + 1} on, as `schedule.kind: {theirs.schedule.kind}` makes those of "
            f"{theirs.steps} steps"
        )
    if validates_after(step, ours) != validates_after(step, theirs):
        return "one of the two ends there and validates, and the other does not"
    return None


def shared_steps(ours: TrainStage, theirs: TrainStage, *, ended: int) -> int:
    """The number of first steps that a training can take over from another one, which differs in its length only, has `ended`
    after that many steps, and keeps its last checkpoint and the one before a decay."""
    kept = (step for step in (ended, step_to_keep(theirs) or 0) if step <= last_step(ours))
    return max((step for step in kept if why_another_step(step, ours, theirs) is None), default=0)
