"""k-means: windows whose vectors point the same way become one cluster.

Plain (Euclidean) k-means, as in the paper, on unit vectors: there the squared distance is 2 - 2 cos of the angle, so it
groups by direction, while a centroid's length (at most 1) still says how tight its cluster is. Spherical k-means would
throw that length away.

Shapes: N windows, K clusters, E = dimensions of a vector. `vectors` may be a memory map: it is read in parts.
"""

from dataclasses import dataclass

import faiss
import numpy as np

from megatron_specialm.base.errors import DataError


@dataclass(frozen=True, eq=False)
class KMeansResult:
    """centroids: (K, E) float32; the rest is of the windows it was fitted on: sizes (K,) int64, how many each cluster
    holds; inertia, the mean squared distance to the nearest centroid; empty, how many clusters hold none."""

    centroids: np.ndarray
    sizes: np.ndarray
    inertia: float
    empty: int


def fit(vectors: np.ndarray, *, k: int, iterations: int, seed: int, sample: int) -> KMeansResult:
    """Lloyd's algorithm from K distinct windows, on `sample` windows drawn without replacement (all in memory).

    A cluster that runs empty takes half of a large one (faiss). Some stay empty when there are fewer distinct vectors
    than clusters. The same seed and vectors give the same centroids on any number of threads, up to the order in which
    a BLAS library adds; on one machine they came out equal to the last bit.

    Args:
        vectors: (N, E) float32.

    Raises:
        DataError: fewer windows than clusters, or vectors that are not finite.
    """
    windows, dimensions = vectors.shape
    drawn = min(windows, sample)
    if k > drawn:
        raise DataError(
            f"k is {k}, but there are {drawn} vectors to fit on (of {windows} windows; sample: {sample}): "
            "use fewer clusters or more generic text"
        )
    rows = np.sort(np.random.default_rng(seed).choice(windows, drawn, replace=False))
    points = _finite(vectors[rows])
    # We have drawn the sample: faiss must neither thin it out nor find it small.
    limits = {"max_points_per_centroid": drawn, "min_points_per_centroid": 1}
    kmeans = faiss.Kmeans(dimensions, k, niter=iterations, seed=seed % 2**31, **limits)
    kmeans.train(points)
    centroids = kmeans.centroids
    assert centroids is not None  # None before training only
    distances, nearest = _index(centroids).search(points, 1)
    sizes = np.bincount(nearest[:, 0], minlength=k)
    return KMeansResult(centroids, sizes, float(distances.mean(dtype=np.float64)), int((sizes == 0).sum()))


def assign(vectors: np.ndarray, centroids: np.ndarray, *, batch: int = 16_384) -> np.ndarray:
    """The nearest centroid of each vector, (N,) int32; `batch` vectors are in memory at a time.

    Args:
        vectors: (N, E) float32.
        centroids: (K, E) float32.

    Raises:
        DataError: lengths of vectors differ, or a vector is not finite.
    """
    if vectors.shape[1] != centroids.shape[1]:
        raise DataError(
            f"vectors have {vectors.shape[1]} dimensions, centroids {centroids.shape[1]}: the encoders differ"
        )
    index = _index(centroids)
    clusters = np.empty(len(vectors), dtype=np.int32)
    for start in range(0, len(vectors), batch):
        part = _finite(vectors[start : start + batch])
        clusters[start : start + batch] = index.search(part, 1)[1][:, 0]
    return clusters


def _index(centroids: np.ndarray) -> faiss.IndexFlatL2:
    """Exact search for the nearest centroid."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return index


def _finite(vectors: np.ndarray) -> np.ndarray:
    """The vectors in memory as faiss wants them, checked: it would give a NaN the cluster -1."""
    points = np.ascontiguousarray(vectors, dtype=np.float32)
    bad = ~np.isfinite(points).all(axis=1)
    if bad.any():
        raise DataError(f"{bad.sum()} of {len(points)} vectors are not finite: the encoder gave NaN or infinity")
    return points
