"""Criteria to select the expert for a domain: cluster frequency, loss, or fine-tuning trials (Grangier et al., arXiv
2402.01093, section 4: most frequent cluster, best pretrained, best fine-tuned; successive halving is ours).

Each criterion returns the experts in order, best first.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_specialm.base.errors import DataError, TrainingError
from megatron_specialm.checkpoint.merged import MergedModel
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.protocol import LossSum
from megatron_specialm.graph.lineage import cluster_of
from megatron_specialm.train.evaluation import score

Order = tuple[str, ...]  # the experts' keys, best first
Load = Callable[[str], MergedModel]
# Fine-tune an expert up to a total number of steps, resuming its earlier steps. Returns its validation loss, which is not
# finite if the training diverged.
Tune = Callable[[str, int], float]


def by_frequency(keys: Sequence[str], histogram_K: np.ndarray, *, domain: str) -> Order:
    """By the fraction of the domain's windows in the expert's cluster. It costs nothing: the clusters are known.

    Raises:
        DataError: no window is in a cluster of these experts.
    """
    shares = {key: float(histogram_K[cluster_of(key)]) for key in keys}
    if not any(shares.values()):
        raise DataError(
            f"{domain}: none of its windows is in a cluster that an expert was trained for ({', '.join(keys)}): train the "
            f"expert c{int(histogram_K.argmax())}, of its most frequent cluster"
        )
    return tuple(sorted(keys, key=lambda key: -shares[key]))


def by_loss(keys: Sequence[str], load: Load, sample: Sequence[Batch]) -> tuple[Order, list[LossSum]]:
    """By the loss on a sample of the domain before fine-tuning; the order, and what each expert has read, packed."""
    losses = {key: score(load(key).build(), sample, packing="packed") for key in keys}
    return best_first({key: loss.mean for key, loss in losses.items()}), list(losses.values())


def by_finetuning(keys: Sequence[str], tune: Tune, steps: int) -> Order:
    """By the validation loss after every expert was fine-tuned for all steps."""
    return best_first({key: tune(key, steps) for key in keys})


def by_halving(keys: Sequence[str], tune: Tune, steps: int) -> Order:
    """By successive halving: fine-tune all experts for a part of the steps, keep the better half, and repeat. The last one has
    had `steps` steps."""
    left: Order = tuple(keys)
    dropped: Order = ()
    for until in halving_rounds(len(keys), steps):
        order = best_first({key: tune(key, until) for key in left})
        count = math.ceil(len(left) / 2)
        left, dropped = order[:count], (*order[count:], *dropped)
    return (*left, *dropped)


def best_first(losses: Mapping[str, float]) -> Order:
    """Keys in order of their loss; losses that are not finite come last.

    Raises:
        TrainingError: no loss is finite.
    """
    if not any(map(math.isfinite, losses.values())):
        raise TrainingError(
            f"none of the experts {', '.join(losses)} has a finite loss: check their trainings, and lower the learning "
            "rate of those, or of the `trial`"
        )
    return tuple(sorted(losses, key=lambda key: losses[key] if math.isfinite(losses[key]) else math.inf))


def halving_rounds(experts: int, steps: int) -> list[int]:
    """The total number of steps of each remaining expert at the end of each round."""
    rounds = max(1, math.ceil(math.log2(experts)))
    return [max(1, round(steps * (number + 1) / rounds)) for number in range(rounds)]


def halving_plan(experts: int, steps: int) -> list[tuple[int, int, int]]:
    """Per round: the number of remaining experts, and the total steps of each before and after the round."""
    plan, before, left = [], 0, experts
    for until in halving_rounds(experts, steps):
        plan.append((left, before, until))
        before, left = until, math.ceil(left / 2)
    return plan


def trial_validations(plan: Sequence[tuple[int, int, int]], *, every: int) -> int:
    """The number of validations in such a plan: of each expert's first weights, every `every` steps, and at a round's end."""
    return plan[0][0] + sum(
        left * (until // every - before // every + bool(until % every)) for left, before, until in plan
    )
