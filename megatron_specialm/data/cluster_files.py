"""Reading and checking the cluster files that stages exchange.

centroids.npy            (K, E) float32, of all clusters
centroid.npy             (E,) float32, of an expert's cluster
clusters.npy             (N,) int32, the cluster of each window
histogram.npy            (K,) float64, the clusters' frequencies
order.npy, offsets.npy   (N,) of `order_type` and (K + 1,) int64: a `ClusterIndex`

A missing, damaged or unfitting file is an `ArtifactError` that names it.
"""

from pathlib import Path

import numpy as np

from megatron_specialm.base.arrays import read_array
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import REMAKE
from megatron_specialm.data.clusters import ClusterIndex, blocks, order_type

CENTROIDS, CENTROID, CLUSTERS = "centroids.npy", "centroid.npy", "clusters.npy"
HISTOGRAM, ORDER, OFFSETS = "histogram.npy", "order.npy", "offsets.npy"


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
    frequencies = read_array(folder / HISTOGRAM, dtype=np.float64, shape=(k,))
    if (frequencies < 0).any() or not abs(frequencies.sum() - 1) < 1e-6:
        raise ArtifactError(f"{folder / HISTOGRAM}: not the frequencies of {k} clusters, which sum to one: {REMAKE}")
    return frequencies


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
