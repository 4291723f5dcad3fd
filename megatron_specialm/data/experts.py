"""The stream of a model of many experts: the windows of each step, and the mixture of experts that computes each.

A batch consists of groups of windows with one mixture. A plain group has windows of one cluster, and its mixture is that
cluster's expert. A soup group (Soup-of-Experts, arXiv 2502.01804) draws a histogram over a few clusters and its windows from
them; its mixture is the experts' codes weighted by the histogram. So the model learns to serve domains that spread over several
clusters. Both are pure functions of (seed, step), as the importance stream is.

The n-th plain group is draw n of an importance stream, whatever soups are between them. If one schedule placed both kinds of
groups, soups could replace the plain groups of the same clusters again and again, and those clusters' experts would never be
trained alone.

Shapes: K clusters, B = global batch size.
"""

import numpy as np

from megatron_specialm.base.errors import DataError
from megatron_specialm.config.training import Soup
from megatron_specialm.data.clusters import ClusterIndex
from megatron_specialm.data.sampling import ImportanceStream, StepDraw, StreamReport


class ExpertStream:
    """Window ids of every optimizer step, with the mixture of experts of each."""

    def __init__(
        self, index: ClusterIndex, *, global_batch_size: int, windows_per_expert: int, soup: Soup | None, seed: int
    ) -> None:
        """Clusters are drawn in proportion to their sizes.

        Raises:
            DataError: the batch size is not a positive multiple of `windows_per_expert`.
        """
        if global_batch_size < 1 or global_batch_size % windows_per_expert:
            raise DataError(
                f"global_batch_size is {global_batch_size}: it must be a positive multiple of {windows_per_expert}"
            )
        self._row, self._groups = windows_per_expert, global_batch_size // windows_per_expert
        self._plain = ImportanceStream(  # a step of this stream is a plain group
            index,
            index.sizes.astype(np.float64),
            global_batch_size=windows_per_expert,
            seed=seed,
            windows_in_a_row=windows_per_expert,
        )
        self._index, self._soup, self._seed = index, soup, seed

    def draw(self, step: int) -> StepDraw:
        """The windows of optimizer step `step`, from 0, and the mixture of experts that computes each.

        Raises:
            DataError: step < 0.
        """
        if step < 0:
            raise DataError(f"step is {step}: steps count from 0")
        numbers = range(step * self._groups, (step + 1) * self._groups)
        soups = np.diff([soups_before(number, self._soup) for number in (*numbers, numbers.stop)]) > 0
        windows = np.empty((self._groups, self._row), np.int64)
        mixtures = np.zeros((self._groups, self._row, len(self._index.sizes)), np.float32)
        if not soups.all():
            first = numbers.start - soups_before(numbers.start, self._soup)
            ids, clusters = self._plain.draw_steps(range(first, first + int((~soups).sum())))
            windows[~soups] = ids.reshape(-1, self._row)
            mixtures[np.flatnonzero(~soups), :, clusters[:: self._row]] = 1
        for group in np.flatnonzero(soups):
            windows[group], mixtures[group] = self._draw_soup(numbers[group])
        return StepDraw(windows.ravel(), mixtures.reshape(len(mixtures) * self._row, -1))

    def report(self, steps: int) -> StreamReport:
        """What the first `steps` steps read: clusters in proportion to their sizes, plain groups to within two groups, soups on
        average."""
        return self._plain.report(steps * self._groups)

    def _draw_soup(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows (row,) and the histogram (K,) of one soup group."""
        soup = self._soup
        assert soup is not None
        generator = np.random.default_rng([self._seed, number])
        sizes = self._index.sizes
        clusters = generator.choice(len(sizes), soup.clusters, p=sizes / sizes.sum())  # with replacement
        histogram = np.zeros(len(sizes))
        np.add.at(histogram, clusters, generator.dirichlet(np.ones(soup.clusters)))
        drawn = generator.choice(len(sizes), self._row, p=histogram / histogram.sum())
        return self._index.members(drawn, generator.integers(0, sizes[drawn])), histogram.astype(np.float32)


def soups_before(number: int, soup: Soup | None) -> int:
    """How many of the groups 0 ... number - 1 are soups; they are spread evenly. In integers, so that it grows by 0 or 1 from
    each group to the next."""
    if soup is None:
        return 0
    numerator, denominator = soup.fraction.as_integer_ratio()
    return number * numerator // denominator


def expert_steps(steps: int, *, budget: str, size: int, sizes: np.ndarray) -> int:
    """Steps of a cluster's own expert: `steps` with an `equal` budget, otherwise in proportion to the cluster's size, where the
    mean over the clusters that are not empty is `steps`."""
    if budget == "equal":
        return steps
    return max(1, round(steps * np.count_nonzero(sizes) * size / int(sizes.sum())))


def check_enough(cluster: int, *, windows: int, needed: int, field: str, otherwise: str) -> None:
    """Refuse an expert whose cluster has fewer windows than it reads at a time, the value of `field` in the config.

    Raises:
        DataError: with both numbers.
    """
    if windows < needed:
        raise DataError(
            f"cluster {cluster} has {windows} generic windows, too few for an expert: fewer than {field} {needed}; lower "
            f"that, or {otherwise}"
        )
