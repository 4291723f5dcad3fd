"""Choose a training's learning rate after all of them were tried (graph/rates.py)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_specialm.base.artifacts import Marker, Spent
from megatron_specialm.base.errors import TrainingError
from megatron_specialm.config.training import TrainStage
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.rates import beyond, trial_key

logger = logging.getLogger(__name__)

SUMMED = ("tokens", "slots", "flops", "wall_seconds", "device_seconds")  # fields of a cost that are summed over trials


@dataclass(frozen=True)
class Choice:
    """The chosen rate, and the markers of all trials by rate."""

    rate: float
    trials: Mapping[float, Marker]

    @property
    def taken(self) -> Marker:
        """The marker of the trial that the training continues."""
        return self.trials[self.rate]

    @property
    def counted(self) -> Spent:
        """The tokens and slots of that trial's steps, which its own cost includes."""
        return Spent(self.taken.whole_cost.tokens, self.taken.whole_cost.slots)

    @property
    def values(self) -> dict[str, Any]:
        """Values for the model's marker: the rate as in the config; each rate's best validation loss in nats per token, None if
        none was finite; and the cost of all trials."""
        costs = [trial.whole_cost for trial in self.trials.values()]
        return {
            "chosen_rate": self.rate,
            "learning_rates": {repr(rate): _loss(trial) for rate, trial in self.trials.items()},
            "trials": {what: sum(getattr(cost, what) for cost in costs) for what in SUMMED},
        }


def choose_rate(stage: TrainStage, context: Context) -> Choice:
    """Choose the rate with the lowest validation loss, the first one of equals.

    Raises:
        TrainingError: no trial has a finite validation loss.
    """
    name, rates = context.task.id, stage.optimizer.rates
    trials = {rate: context.marker(name.stage, trial_key(name.key, rate)) for rate in rates}
    finite = {rate: loss for rate, trial in trials.items() if (loss := _loss(trial)) is not None}
    if not finite:
        raise TrainingError(
            f"{name}: at none of the learning rates {_format_rates(rates)} were the losses finite: give lower ones in "
            f"stages.{name.stage}.optimizer.learning_rate, or check the weights that it starts from"
        )
    choice = Choice(min(finite, key=finite.__getitem__), trials)
    if context.world.is_first:
        _log_choice(choice, context)
    return choice


def _log_choice(choice: Choice, context: Context) -> None:
    name, rate, rates = context.task.id, choice.rate, list(choice.trials)
    others = ", ".join(_format_loss(_loss(trial)) for other, trial in choice.trials.items() if other != rate)
    found = _format_loss(_loss(choice.taken))
    logger.info(
        "%s: learning rate %r of %s (validation loss %s against %s)", name, rate, _format_rates(rates), found, others
    )
    if untried := beyond(rate, rates):
        logger.warning("%s: %r is at an end of the list: %s rates were not tried", name, rate, untried)


def _loss(trial: Marker) -> float | None:
    loss: float | None = trial.values["validation_loss"]
    return loss


def _format_rates(rates: list[float]) -> str:
    return ", ".join(map(repr, rates))


def _format_loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
