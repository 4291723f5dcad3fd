"""Several learning rates of one training. Each is tried by a task of its own (`slm-tuned/legal.rate-0.0017`). The
training's own task (`slm-tuned/legal`) reads these trials, chooses the one with the best validation loss, and continues
from its checkpoint.

A trial is the training at that rate, with the same steps, schedule and early stopping; `trial_steps` may end it earlier.
"""

from collections.abc import Sequence
from typing import Literal

from megatron_specialm.config.training import TrainStage
from megatron_specialm.graph.tasks import Task


def trial_key(key: str, rate: float) -> str:
    """The key of the task that tries a rate for a model. Keys of models have no dot."""
    return f"{key}.rate-{rate!r}"


def trial_names(task: Task, stage: TrainStage) -> set[str]:
    """The trials of a training's rates, as `stage/key`; none where the task is itself a trial."""
    rates = stage.optimizer.rates if task.rate is None else []
    return {f"{task.id.stage}/{trial_key(task.id.key, rate)}" for rate in rates}


def at_rate(stage: TrainStage, rate: float) -> TrainStage:
    """The training at one of its rates, to the end."""
    optimizer = stage.optimizer.model_copy(update={"learning_rate": rate})
    return stage.model_copy(update={"optimizer": optimizer, "trial_steps": None})


def trial_of(stage: TrainStage, rate: float) -> TrainStage:
    """The training at one of its rates, until the rates are compared."""
    return at_rate(stage, rate).model_copy(update={"trial_steps": steps_to_compare(stage)})


def steps_to_compare(stage: TrainStage) -> int | None:
    """The number of steps after which rates are compared: at the first validation at or after `trial_steps`. None: at the
    end."""
    if stage.trial_steps is None or stage.early_stopping is None:
        return None
    every = stage.early_stopping.evaluate_every
    steps = every * -(-stage.trial_steps // every)
    return steps if steps < stage.steps else None


def beyond(rate: float, rates: Sequence[float]) -> Literal["lower", "higher"] | None:
    """Which rates beside the chosen one were not tried, where it is the lowest or highest of those that were."""
    return "lower" if rate == min(rates) else "higher" if rate == max(rates) else None
