"""The held-out windows that a training is validated on, which have the distribution that it is trained for.

| training                      | validated on                                                                      |
|-------------------------------|-----------------------------------------------------------------------------------|
| `generic`                     | all held-out windows of the generic set                                           |
| `cluster`                     | those of them in the cluster                                                      |
| `importance`                  | all of them, weighted so that their clusters have the frequencies of the training |
| `domain`, `domain_fraction`   | the domain's held-out windows                                                     |
| an expert per cluster         | all of the generic set's, each with the expert of its cluster                     |

Shapes: V held-out windows, K clusters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from megatron_specialm.base.errors import DataError
from megatron_specialm.data.batches import Windows
from megatron_specialm.data.clusters import ClusterIndex, importance_weights
from megatron_specialm.data.store import MIXTURE, Batch

UNIT = 1 << 14  # the average weight of a window: weights are whole numbers, as counts of tokens are


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Windows of a validation split, each computed once per validation.

    ids: (V,) int64.
    weights: (V,) float32, whole numbers: the weight of each token of a window; None for 1.
    clusters: (V,) int64, the expert of each window, one of `experts`; None for a model without experts.
    """

    store: Windows
    ids: np.ndarray
    weights: np.ndarray | None = None
    clusters: np.ndarray | None = None
    experts: int = 0

    @property
    def effective_tokens(self) -> float:
        """The number of tokens of equal weight with the same variance of the mean: the squared sum of the weights over the sum
        of their squares (Kish 1965)."""
        total = squares = 0.0
        for batch in self.batches(batch_size=256):
            weights = batch.mask.astype(np.float64)
            total, squares = total + weights.sum(), squares + np.square(weights).sum()
        return total * total / squares if squares else 0.0

    def batches(self, *, batch_size: int, rank: int = 0, processes: int = 1) -> Iterator[Batch]:
        """This process's batches of at most `batch_size` windows, each of one expert. All processes have equally many, as
        collective operations require: the last may be one whose mask is zero."""
        chunks = list(self._chunks(batch_size))
        for first in range(0, len(chunks), processes):
            number = first + rank
            batch = self._batch(chunks[number if number < len(chunks) else 0])
            yield batch if number < len(chunks) else batch._replace(mask=np.zeros_like(batch.mask))

    def _chunks(self, batch_size: int) -> Iterator[np.ndarray]:
        """Places (B,) in `ids`, in batches."""
        places = np.arange(len(self.ids))
        if self.clusters is None:
            parts = [places]
        else:
            parts = [places[self.clusters == cluster] for cluster in np.unique(self.clusters)]
        for part in parts:
            yield from (part[start : start + batch_size] for start in range(0, len(part), batch_size))

    def _batch(self, places: np.ndarray) -> Batch:
        batch = self.store.batch(self.ids[places])
        mask = batch.mask if self.weights is None else batch.mask * self.weights[places][:, None]
        if self.clusters is None:
            return batch._replace(mask=mask)
        mixtures = np.eye(self.experts, dtype=np.float32)[self.clusters[places]]
        return batch._replace(mask=mask, extra_inputs=MappingProxyType({MIXTURE: mixtures}))


def all_windows(store: Windows) -> HeldOut:
    """A whole split."""
    return HeldOut(store, np.arange(len(store)))


def of_cluster(store: Windows, index: ClusterIndex, cluster: int) -> HeldOut:
    """The windows of one cluster.

    Args:
        index: of the split's windows.
    """
    return HeldOut(store, np.flatnonzero(clusters_of(index) == cluster))


def like(store: Windows, index: ClusterIndex, target: np.ndarray) -> tuple[HeldOut, float]:
    """All windows, weighted by `w(x) = target(c(x)) / held-out(c(x))`, as the importance stream draws training windows; and
    the fraction of the target that is lost: in clusters without a held-out window.

    Args:
        target: (K,) frequencies.

    Raises:
        DataError: all of it is lost.
    """
    held = int(np.count_nonzero(index.sizes))
    if not (target[index.sizes > 0] > 0).any():
        raise DataError(
            f"the {len(store)} held-out generic windows are in {held} clusters, and none of the {np.count_nonzero(target)} "
            "clusters that are trained on is among them"
        )
    weights_K, lost = importance_weights(target, index.sizes)
    per_window_K = np.round(UNIT * len(store) * weights_K / np.maximum(index.sizes, 1))
    weights = per_window_K[clusters_of(index)].astype(np.float32)
    ids = np.flatnonzero(weights)
    return HeldOut(store, ids, weights[ids]), lost


def by_expert(store: Windows, index: ClusterIndex) -> HeldOut:
    """All windows, each with the expert of its cluster."""
    return HeldOut(store, np.arange(len(store)), clusters=clusters_of(index), experts=len(index.sizes))


def clusters_of(index: ClusterIndex) -> np.ndarray:
    """The cluster of each window, (V,) int64."""
    by_cluster = np.repeat(np.arange(len(index.sizes)), index.sizes)
    clusters = np.empty_like(by_cluster)
    clusters[index.members(by_cluster, np.arange(len(by_cluster)) - index.offsets[by_cluster])] = by_cluster
    return clusters
