"""How long trainings are, and which steps of one are steps of another that differs from it in length alone."""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_specialm.config.schedule import steps_at_same_rates
from megatron_specialm.config.training import Schedule, TrainStage

# The settings that decide when a training ends and at which rates its steps are made, and nothing else.
LENGTH = ("steps", "schedule", "trial_steps")


def last_step(settings: TrainStage) -> int:
    """The step after which a training ends, if it is not stopped before."""
    return min(settings.steps, settings.trial_steps or settings.steps)


def validates_after(step: int, settings: TrainStage) -> bool:
    """Whether a training validates after so many steps: every now and then, and at its end."""
    stopping = settings.early_stopping
    return stopping is not None and (step % stopping.evaluate_every == 0 or step >= settings.steps)


def but_for_length(made_from: Mapping[str, Any], trials: Collection[str]) -> dict[str, Any]:
    """What a training's digest covers (`digest_content` of `graph/tasks.py`), without what is of a length.

    Args:
        trials: its own trials, as `stage/key`, which are as long as it is.
    """
    settings = {name: value for name, value in made_from["settings"].items() if name not in LENGTH}
    inputs = {name: digest for name, digest in made_from["inputs"].items() if name not in trials}
    return {**made_from, "settings": settings, "inputs": inputs}


def at_length(stage: TrainStage, settings: Mapping[str, Any]) -> TrainStage:
    """A training as long as the one whose settings, as a digest covers them, are given."""
    schedule = Schedule.model_validate(settings.get("schedule", {}))
    return stage.model_copy(update={"steps": settings["steps"], "schedule": schedule})


def why_another_step(step: int, ours: TrainStage, theirs: TrainStage) -> str | None:
    """Why a step of their training is none of ours, which differs from it in length alone; None where it is the same, to the
    last bit."""
    same = steps_at_same_rates(ours, theirs, most=step)
    if same < step:
        return (
            f"the learning rates differ from step {same + 1} on, as `schedule.kind: {theirs.schedule.kind}` makes those of "
            f"{theirs.steps} steps"
        )
    if validates_after(step, ours) != validates_after(step, theirs):
        return "one of the two validates there, as at its end, and the other does not"
    return None
