"""The choice between a training's learning rates, after all were tried (config/rates.py)."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_specialm.base.artifacts import Marker
from megatron_specialm.base.errors import TrainingError
from megatron_specialm.config.rates import beyond, trial_key
from megatron_specialm.config.training import TrainStage
from megatron_specialm.stages.context import Context

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The rate taken. `losses`: each rate's best validation loss, nats per token; None where it came to nothing. `trial` is
    the marker of the training that is gone on with."""

    rate: float
    losses: Mapping[float, float | None]
    trial: Marker


def choose_rate(stage: TrainStage, context: Context) -> Choice:
    """The rate whose trial has the lowest validation loss, the first of equal ones.

    Raises:
        TrainingError: all trials came to nothing.
    """
    name, rates = context.task.id, stage.optimizer.rates
    trials = {rate: context.marker(name.stage, trial_key(name.key, rate)) for rate in rates}
    losses = {rate: trial.values["validation_loss"] for rate, trial in trials.items()}
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not finite:
        raise TrainingError(
            f"{name}: at none of the learning rates {_listed(rates)} were the losses finite: give lower ones in "
            f"stages.{name.stage}.optimizer.learning_rate, or look at the weights that it starts from"
        )
    choice = Choice(rate := min(finite, key=finite.__getitem__), losses, trials[rate])
    if context.world.is_first:
        _tell(choice, context)
    return choice


def _tell(choice: Choice, context: Context) -> None:
    name, rate, rates = context.task.id, choice.rate, list(choice.losses)
    others = ", ".join(_told(loss) for other, loss in choice.losses.items() if other != rate)
    found = _told(choice.losses[rate])
    logger.info("%s: learning rate %r of %s (validation loss %s against %s)", name, rate, _listed(rates), found, others)
    if untried := beyond(rate, rates):
        logger.warning("%s: %r is at an end of the list: %s rates were not tried", name, rate, untried)


def _listed(rates: list[float]) -> str:
    return ", ".join(map(repr, rates))


def _told(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.3f}"
