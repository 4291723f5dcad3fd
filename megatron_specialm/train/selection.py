"""Which expert serves a domain best: by its clusters, by loss, or by trying (Grangier et al., arXiv 2402.01093, section
4: most frequent cluster, best pretrained, best fine-tuned; successive halving is ours).

A criterion puts the experts in an order, best first, and says what that cost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_specialm.base.errors import DataError
from megatron_specialm.config.lineage import cluster_of
from megatron_specialm.data.store import Batch
from megatron_specialm.train.evaluation import score
from megatron_specialm.train.served import ServedModel


class Spent(NamedTuple):
    """Tokens that all experts together read, at most (windows may be shorter than the context), and FLOPs."""

    tokens: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Ranking:
    """The experts' keys, best first."""

    order: tuple[str, ...]
    spent: Spent


Load = Callable[[str], ServedModel]
# Fine-tune an expert until it has had so many steps, going on from where it stood: its validation loss.
Tune = Callable[[str, int], float]


def by_frequency(keys: Sequence[str], histogram_K: np.ndarray, *, domain: str) -> Ranking:
    """By how much of the domain lies in the expert's cluster. Costs nothing: the clusters are known.

    Raises:
        DataError: none of the domain does.
    """
    shares = {key: float(histogram_K[cluster_of(key)]) for key in keys}
    if not any(shares.values()):
        raise DataError(
            f"{domain}: none of its windows is in a cluster that an expert was trained for ({', '.join(keys)}): train the "
            f"expert c{int(histogram_K.argmax())}, of its most frequent cluster"
        )
    return Ranking(tuple(sorted(keys, key=lambda key: -shares[key])), Spent())


def by_loss(keys: Sequence[str], load: Load, sample: Sequence[Batch], cost: Spent) -> Ranking:
    """By the loss on a sample of the domain, before any fine-tuning: one forward pass of every expert."""
    losses = {key: score(load(key).build(), sample).mean for key in keys}
    return Ranking(_best_first(losses), cost)


def by_finetuning(keys: Sequence[str], tune: Tune, steps: int, cost: Spent) -> Ranking:
    """By validation loss after each expert has been fine-tuned to the end."""
    return Ranking(_best_first({key: tune(key, steps) for key in keys}), cost)


def by_halving(keys: Sequence[str], tune: Tune, steps: int, cost: Spent) -> Ranking:
    """By successive halving: fine-tune all a little, keep the better half, and again, so that the last one has had
    `steps` steps."""
    left: tuple[str, ...] = tuple(keys)
    dropped: tuple[str, ...] = ()
    for until in halving_rounds(len(keys), steps):
        order = _best_first({key: tune(key, until) for key in left})
        kept = math.ceil(len(left) / 2)
        left, dropped = order[:kept], (*order[kept:], *dropped)
    return Ranking((*left, *dropped), cost)


def halving_rounds(experts: int, steps: int) -> list[int]:
    """How many steps each survivor has had at the end of each round."""
    rounds = max(1, math.ceil(math.log2(experts)))
    return [max(1, round(steps * (number + 1) / rounds)) for number in range(rounds)]


def halving_steps(experts: int, steps: int) -> int:
    """Steps of all experts together under successive halving."""
    total, before, left = 0, 0, experts
    for until in halving_rounds(experts, steps):
        total, before, left = total + left * (until - before), until, math.ceil(left / 2)
    return total


def _best_first(losses: dict[str, float]) -> tuple[str, ...]:
    return tuple(sorted(losses, key=lambda key: losses[key]))
