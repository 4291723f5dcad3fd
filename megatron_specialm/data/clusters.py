"""The clusters of a set's windows: the windows of each, their frequencies, importance weights, and the files that stages
exchange.

centroids.npy            (K, E) float32, of all clusters
centroid.npy             (E,) float32, of an expert's cluster
clusters.npy             (N,) int32, the cluster of each window
histogram.npy            (K,) float64, the clusters' frequencies
order.npy, offsets.npy   (N,) of `order_type` and (K + 1,) int64: a `ClusterIndex`

A missing, damaged or unfitting file is an `ArtifactError` that names it.

Shapes: N windows, K clusters, E dimensions of a vector.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_specialm.base.arrays import read_array
from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import REMAKE

CENTROIDS, CENTROID, CLUSTERS = "centroids.npy", "centroid.npy", "clusters.npy"
HISTOGRAM, ORDER, OFFSETS = "histogram.npy", "order.npy", "offsets.npy"
BLOCK = 1 << 20  # windows sorted at a time, at about 40 bytes each


def importance_weights(target: np.ndarray, generic_sizes: np.ndarray) -> tuple[np.ndarray, float]:
    """The weight of each generic cluster with which draws have the target's histogram.

    Args:
        target: (K,) histogram of the specialization set, as counts or frequencies.
        generic_sizes: (K,) generic windows per cluster.

    Returns:
        (K,) weights summing to 1: the target, restricted to clusters with generic windows. And the fraction of the target
        that is lost: in clusters without any.

    Raises:
        DataError: lengths differ, a target is negative or not finite, or all of it is lost.
    """
    sizes = np.asarray(generic_sizes)
    target = frequencies(target, k=len(sizes), name="target histogram")
    weights = np.where(sizes > 0, target, 0.0)
    if not weights.any():
        raise DataError(
            f"none of the target's {np.count_nonzero(target)} clusters has a generic window: "
            "use fewer clusters or more generic text"
        )
    return weights / math.fsum(weights), math.fsum(target[sizes <= 0])


@dataclass(frozen=True, eq=False)
class ClusterIndex:
    """The windows of each cluster: cluster c has order[offsets[c]:offsets[c + 1]].

    order: (N,) window ids sorted by cluster, of any integer type, possibly a memory map; None for the identity.
    offsets: (K + 1,) int64, from 0 to N.
    """

    order: np.ndarray | None
    offsets: np.ndarray

    def __post_init__(self) -> None:
        n = self.offsets[-1] if self.order is None else len(self.order)
        if len(self.offsets) < 2 or self.offsets[0] != 0 or self.offsets[-1] != n or (np.diff(self.offsets) < 0).any():
            raise DataError(
                f"offsets must rise from 0 to the {n} windows of the order: they are not of one index, rebuild"
            )

    @classmethod
    def single(cls, windows: int) -> "ClusterIndex":
        """All windows in one cluster: plain pretraining."""
        return cls(order=None, offsets=np.array([0, windows], dtype=np.int64))

    def joined(self, other: "ClusterIndex") -> "ClusterIndex":
        """This index with the clusters of another set appended, whose windows are numbered on from this one's."""
        parts = (self, other)
        if all(part.order is None for part in parts):
            order = None
        else:
            first, second = (np.arange(part.offsets[-1]) if part.order is None else part.order for part in parts)
            total = int(self.offsets[-1] + other.offsets[-1])
            dtype = order_type(total)
            order = np.concatenate(
                [first.astype(dtype), (np.asarray(second, np.int64) + self.offsets[-1]).astype(dtype)]
            )
        return ClusterIndex(order, np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]]))

    def members(self, clusters: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Window ids (B,) int64, at `places` (B,), each in [0, size), of `clusters` (B,)."""
        positions = self.offsets[clusters] + places
        return positions if self.order is None else np.asarray(self.order)[positions].astype(np.int64)

    @property
    def sizes(self) -> np.ndarray:
        """Windows per cluster, (K,) int64."""
        return np.diff(self.offsets)


def order_type(windows: int) -> type[np.integer]:
    """The integer type of window ids up to `windows`."""
    return np.int32 if windows < 1 << 31 else np.int64


def sort_by_cluster(parts: Sequence[np.ndarray], order: np.ndarray, *, k: int) -> np.ndarray:
    """Fill the order of a `ClusterIndex` and return its offsets. A counting sort with a block of windows in memory at a time:
    ids and order may be memory maps.

    Args:
        parts: arrays that together hold the cluster ids of all windows.
        order: (N,) to fill, of `order_type`.

    Raises:
        DataError: no ids, or an id outside [0, k).
    """
    sizes = np.sum([_count(block, k) for block in blocks(parts)], axis=0)
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    free = offsets[:-1].copy()  # where each cluster's next window goes
    start = 0  # the number of the block's first window
    for block in blocks(parts):
        ids = block.astype(np.uint16 if k <= 1 << 16 else np.int64)  # 16 bits: radix sort
        by_cluster = np.argsort(ids, kind="stable")
        counts = np.bincount(block, minlength=k)
        places = np.arange(len(block)) + np.repeat(free - (np.cumsum(counts) - counts), counts)
        order[places] = start + by_cluster
        free += counts
        start += len(block)
    return offsets


def blocks(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The numbers in some arrays, in blocks that fit into memory."""
    for part in parts:
        for start in range(0, max(len(part), 1), BLOCK):  # an empty part is an empty block, which `_count` refuses
            yield np.asarray(part[start : start + BLOCK])


def _count(clusters: np.ndarray, k: int) -> np.ndarray:
    """Windows per cluster, (K,) int64. Refuses ids outside [0, k)."""
    clusters = np.asarray(clusters)
    if clusters.size == 0:
        raise DataError("no cluster ids: the set has no windows")
    if clusters.ndim != 1 or clusters.dtype.kind not in "iu":
        raise DataError(f"cluster ids of shape {clusters.shape} and type {clusters.dtype}: they must be (N,) integers")
    low, high = int(clusters.min()), int(clusters.max())
    if low < 0 or high >= k:
        raise DataError(f"cluster ids from {low} to {high} do not fit {k} clusters: assign with the same centroids")
    return np.bincount(clusters, minlength=k)


def frequencies(values: np.ndarray, *, k: int, name: str) -> np.ndarray:
    """Values (K,) divided by their sum, float64, with the same bits on every machine (fsum is exact).

    Raises:
        DataError: not K values, one is negative or not finite, or all are zero.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (k,):
        raise DataError(f"{name} of shape {values.shape} for {k} clusters: give one value per cluster")
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if wrong.size:
        raise DataError(f"{name}: cluster {wrong[0]} has {values[wrong[0]]}: give finite values that are not negative")
    if not values.any():
        raise DataError(f"{name}: all {k} values are zero: at least one must be positive")
    values = values / values.max()
    return values / math.fsum(values)


def read_centroids(folder: Path, *, k: int, dimensions: int | None = None) -> np.ndarray:
    """The centroids (K, E), finite."""
    return read_array(folder / CENTROIDS, dtype=np.float32, shape=(k, dimensions))


def read_clusters(folder: Path, *, k: int) -> np.ndarray:
    """The cluster of each window (N,), in [0, K), as a memory map."""
    clusters = read_array(folder / CLUSTERS, dtype=np.int32, shape=(None,), mapped=True)
    _check_range(folder / CLUSTERS, clusters, k)
    return clusters


def read_histogram(folder: Path, *, k: int) -> np.ndarray:
    """Frequencies (K,), not negative, summing to one."""
    histogram = read_array(folder / HISTOGRAM, dtype=np.float64, shape=(k,))
    if (histogram < 0).any() or not abs(histogram.sum() - 1) < 1e-6:
        raise ArtifactError(f"{folder / HISTOGRAM}: not the frequencies of {k} clusters, which sum to one: {REMAKE}")
    return histogram


def read_index(folder: Path, *, windows: int, k: int) -> ClusterIndex:
    """The index of `windows` windows in K clusters; its order is a memory map."""
    order = read_array(folder / ORDER, dtype=order_type(windows), shape=(windows,), mapped=True)
    _check_range(folder / ORDER, order, windows)
    offsets = read_array(folder / OFFSETS, dtype=np.int64, shape=(k + 1,))
    if offsets[0] != 0 or offsets[-1] != windows or (np.diff(offsets) < 0).any():
        raise ArtifactError(f"{folder / OFFSETS}: does not rise from 0 to the {windows} windows of the order: {REMAKE}")
    return ClusterIndex(order, offsets)


def _check_range(path: Path, numbers: np.ndarray, limit: int) -> None:
    for block in blocks([numbers]):
        if block.size and not 0 <= block.min() <= block.max() < limit:
            raise ArtifactError(
                f"{path}: has numbers from {block.min()} to {block.max()}, which are not in [0, {limit}): {REMAKE}"
            )


@dataclass(frozen=True)
class Concentration:
    """top_share: the frequency of the most frequent cluster, in (0, 1].
    entropy: in nats, from 0 to log K.
    effective_clusters: exp(entropy), the number of equally frequent clusters with that entropy.
    """

    top_share: float
    entropy: float
    effective_clusters: float


def concentration(histogram: np.ndarray) -> Concentration:
    """The concentration of a histogram (K,) of frequencies that sum to 1."""
    present = histogram[histogram > 0]
    entropy = float(present @ -np.log(present))
    return Concentration(float(histogram.max()), entropy, float(np.exp(entropy)))
