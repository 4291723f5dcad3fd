"""The order of reading for models of many experts: which windows, and which mixture of experts computes each.

A batch is made of groups of windows that share a mixture. A plain group is of one cluster, and its mixture is that
cluster's expert. A soup group (Soup-of-Experts, arXiv 2502.01804) draws a histogram over a few clusters, its windows
from these, and is computed by the experts' codes weighted by the histogram: so the model learns to be asked for a domain
that is spread over clusters. Both are pure functions of (seed, step), as the importance stream is.

Shapes: K clusters, B = global batch size, G = groups of a step.
"""

import math

import numpy as np

from megatron_specialm.base.errors import DataError
from megatron_specialm.config.training import Soup
from megatron_specialm.data.clusters import ClusterIndex
from megatron_specialm.data.sampling import ImportanceStream, StreamReport


class ExpertStream:
    """Window ids of every optimizer step, with the mixture of experts of each."""

    def __init__(
        self, index: ClusterIndex, *, global_batch_size: int, windows_per_expert: int, soup: Soup | None, seed: int
    ) -> None:
        """Clusters are drawn as often as they are large.

        Raises:
            DataError: the batch is not made of whole groups.
        """
        self._plain = ImportanceStream(
            index,
            index.sizes.astype(np.float64),
            global_batch_size=global_batch_size,
            seed=seed,
            windows_in_a_row=windows_per_expert,
        )
        self._index, self._soup, self._seed = index, soup, seed
        self._row, self._groups = windows_per_expert, global_batch_size // windows_per_expert

    def global_batch(self, step: int) -> np.ndarray:
        """Window ids of optimizer step `step` (from 0), (B,) int64."""
        return self._draw(step)[0]

    def mixtures(self, step: int) -> np.ndarray:
        """The mixture of experts that computes each window of `global_batch(step)`, (B, K) float32, each summing to 1."""
        return self._draw(step)[1]

    def report(self, steps: int) -> StreamReport:
        """What a run of `steps` steps will read: soup groups draw their clusters by the same frequencies."""
        return self._plain.report(steps)

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        windows = self._plain.global_batch(step)
        mixtures = np.zeros((len(windows), len(self._index.sizes)), np.float32)
        mixtures[np.arange(len(windows)), self._plain.clusters(step)] = 1
        for group in range(self._groups):
            number = step * self._groups + group
            if self._soup is not None and _falls_to(number, self._soup.fraction):
                rows = slice(group * self._row, (group + 1) * self._row)
                windows[rows], mixtures[rows] = self._draw_soup(self._soup, number)
        return windows, mixtures

    def _draw_soup(self, soup: Soup, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows (row,) and the histogram (K,) of one soup group."""
        generator = np.random.default_rng([self._seed, number])
        sizes = self._index.sizes
        clusters = generator.choice(len(sizes), soup.clusters, p=sizes / sizes.sum())  # one drawn twice weighs more
        histogram = np.zeros(len(sizes))
        np.add.at(histogram, clusters, generator.dirichlet(np.ones(soup.clusters)))
        drawn = generator.choice(len(sizes), self._row, p=histogram / histogram.sum())
        return self._index.members(drawn, generator.integers(0, sizes[drawn])), histogram.astype(np.float32)


def _falls_to(number: int, fraction: float) -> bool:
    """Whether the n-th of a sequence is among `fraction` of it, evenly spread."""
    return math.floor((number + 1) * fraction) > math.floor(number * fraction)


def expert_steps(steps: int, *, budget: str, size: int, sizes: np.ndarray) -> int:
    """Steps of a cluster's own expert: `steps`, or in proportion to the cluster, so that the mean over all clusters that
    have windows is `steps`."""
    if budget == "equal":
        return steps
    return max(1, round(steps * np.count_nonzero(sizes) * size / int(sizes.sum())))


def check_enough(cluster: int, *, windows: int, needed: int, field: str, otherwise: str) -> None:
    """Refuse an expert whose cluster is smaller than what it reads at a time, which `field` of the page says.

    Raises:
        DataError: with both numbers.
    """
    if windows < needed:
        raise DataError(
            f"cluster {cluster} has {windows} generic windows, too few for an expert: fewer than {field} {needed}; lower "
            f"that, or {otherwise}"
        )
