"""k-means: windows whose vectors point the same way become one cluster.

Plain (Euclidean) k-means, as in the paper, on unit vectors: there the squared distance is 2 - 2 cos of the angle, so it
groups by direction, while a centroid's length (at most 1) still says how tight its cluster is. Spherical k-means would
throw that length away.

Lloyd's iterations on any number of ranks with the same centroids to the last bit: the sample is cut in blocks that do not
depend on the ranks, a block is worked on by one rank, always with the same operands and threads, and what it adds to a
cluster's sum is rounded to a whole number of tiny units, so that it no longer matters who adds what to what first.

Shapes: N windows, n of them fitted on, K clusters, E = dimensions of a vector. `vectors` may be `Vectors`, on disk.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import faiss
import numpy as np
from scipy.sparse import csr_matrix

from megatron_specialm.base.errors import DataError
from megatron_specialm.clustering.ranks import Alone, Ranks
from megatron_specialm.clustering.vectors import Vectors
from megatron_specialm.data.permutation import shuffled

BLOCK = 16_384  # vectors that are searched and summed at a time
APART = 1 / 1024  # the halves of a cluster are moved apart by so much of its centroid (as faiss does)


@dataclass(frozen=True, eq=False)
class KMeansResult:
    """centroids: (K, E) float32; the rest is of the windows it was fitted on: sizes (K,) int64, how many each cluster
    holds; inertia, the mean squared distance to the nearest centroid; empty, how many clusters hold none."""

    centroids: np.ndarray
    sizes: np.ndarray
    inertia: float
    empty: int


def fit(
    vectors: np.ndarray | Vectors,
    *,
    k: int,
    iterations: int,
    seed: int,
    sample: int,
    ranks: Ranks | None = None,
    counted: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> KMeansResult:
    """Lloyd's algorithm from K distinct windows, on `sample` windows drawn without replacement; a rank has its share of
    them in memory. All ranks return the same.

    A cluster that runs empty takes half of the largest one. Some stay empty when there are fewer distinct vectors than
    clusters. The same seed and vectors give the same centroids on any number of ranks; on another number of threads up to
    the order in which a BLAS library adds.

    Args:
        vectors: (N, E) float32.
        ranks: who fits together; default: this process alone.
        counted: passes the numbers of the iterations on, to tell how far it is.

    Raises:
        DataError: fewer windows than clusters, or vectors that are not finite.
    """
    ranks = ranks or Alone()
    drawn = min(len(vectors), sample)
    if k > drawn:
        raise DataError(
            f"k is {k}, but there are {drawn} vectors to fit on (of {len(vectors)} windows; sample: {sample}): "
            "use fewer clusters or more generic text"
        )
    rows = _draw(len(vectors), drawn, seed=seed)
    sample_ = _Sample(vectors, np.sort(rows), ranks)
    centroids = _read(vectors, np.sort(rows[:k]))
    for _ in counted(range(iterations)):
        sums, sizes = sample_.sums(centroids)
        centroids = _split_for_empty(_means(sums, sizes, centroids), sizes)
    sizes, inertia = sample_.spread(centroids)
    return KMeansResult(centroids, sizes, inertia, int((sizes == 0).sum()))


def assign(
    vectors: np.ndarray | Vectors,
    centroids: np.ndarray,
    *,
    batch: int = BLOCK,
    counted: Callable[[Iterable[range]], Iterable[range]] = iter,
) -> np.ndarray:
    """The nearest centroid of each vector, (N,) int32; `batch` vectors are in memory at a time.

    Args:
        vectors: (N, E) float32.
        centroids: (K, E) float32.
        counted: passes the batches' ranges of windows on, to tell how far it is.

    Raises:
        DataError: lengths of vectors differ, or a vector is not finite.
    """
    if vectors.shape[1] != centroids.shape[1]:
        raise DataError(
            f"vectors have {vectors.shape[1]} dimensions, centroids {centroids.shape[1]}: the encoders differ"
        )
    index = _index(centroids)
    clusters = np.empty(len(vectors), dtype=np.int32)
    windows = range(len(vectors))
    for rows in counted(windows[start : start + batch] for start in windows[::batch]):
        part = _read(vectors, np.arange(rows.start, rows.stop))
        _refuse_bad(_bad_rows(part), of=len(part))
        clusters[rows.start : rows.stop] = index.search(part, 1)[1][:, 0]
    return clusters


class _Sample:
    """The vectors to fit on, of which each rank holds a range of blocks, and what all ranks find out about them."""

    def __init__(self, vectors: np.ndarray | Vectors, rows: np.ndarray, ranks: Ranks) -> None:
        """rows: (n,) ascending window numbers."""
        self._ranks, self._windows = ranks, len(rows)
        self._blocks = -(-len(rows) // BLOCK)
        self._own = range(self._blocks * ranks.rank // ranks.size, self._blocks * (ranks.rank + 1) // ranks.size)
        self._vectors = [_read(vectors, rows[block * BLOCK : (block + 1) * BLOCK]) for block in self._own]
        bad = sum(_bad_rows(part) for part in self._vectors)
        _refuse_bad(int(ranks.total(np.array(bad))), of=len(rows))  # all ranks together, so that none waits for another
        largest = ranks.largest(max((float(np.abs(part).max()) for part in self._vectors), default=0.0))
        # One unit of the sums. A power of two, so that scaling is exact; n vectors of the largest value do not overflow.
        self._unit = 2.0 ** (math.frexp(largest)[1] + len(rows).bit_length() - 62)

    def sums(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each centroid's cluster: the sum of its vectors, (K, E) float64, and their number, (K,) int64."""
        index, units = _index(centroids), np.zeros(centroids.shape, np.int64)
        sizes = np.zeros(len(centroids), np.int64)
        for part in self._vectors:
            nearest = index.search(part, 1)[1][:, 0]
            members = np.bincount(nearest, minlength=len(centroids))
            rows = np.argsort(nearest, kind="stable")
            memberships = csr_matrix((np.ones(len(part)), rows, np.cumsum([0, *members])), (len(centroids), len(part)))
            units += np.rint(memberships @ part.astype(np.float64) / self._unit).astype(np.int64)
            sizes += members
        return self._ranks.total(units) * self._unit, self._ranks.total(sizes)

    def spread(self, centroids: np.ndarray) -> tuple[np.ndarray, float]:
        """How many vectors each cluster holds, (K,) int64, and the mean squared distance to the nearest centroid."""
        index, sizes = _index(centroids), np.zeros(len(centroids), np.int64)
        distances = np.zeros(self._blocks)  # of each block by its own rank: adding zeros is exact
        for block, part in zip(self._own, self._vectors, strict=True):
            squared, nearest = index.search(part, 1)
            distances[block] = squared.sum(dtype=np.float64)
            sizes += np.bincount(nearest[:, 0], minlength=len(centroids))
        return self._ranks.total(sizes), math.fsum(self._ranks.total(distances)) / self._windows


def _draw(windows: int, count: int, *, seed: int) -> np.ndarray:
    """`count` of the window numbers without replacement, (n,) int64 in random order, in memory for what is drawn only."""
    keys = np.full(count, seed % 2**64, np.uint64)
    return shuffled(np.arange(count), sizes=np.full(count, windows), keys=keys)


def _means(sums: np.ndarray, sizes: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The clusters' means, (K, E) float32; an empty one's centroid stays where it was."""
    means = sums / np.maximum(sizes, 1)[:, None]
    return np.where(sizes[:, None] > 0, means, before).astype(np.float32)


def _split_for_empty(centroids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Give each empty cluster half of the largest one, by centroids on both sides of that one's."""
    sizes = sizes.copy()
    aside = np.where(np.arange(centroids.shape[1]) % 2, 1 - APART, 1 + APART).astype(np.float32)
    for empty in np.flatnonzero(sizes == 0):
        largest = sizes.argmax()
        centroids[empty] = centroids[largest] * aside
        centroids[largest] *= 2 - aside
        sizes[empty] = sizes[largest] // 2
        sizes[largest] -= sizes[empty]
    return centroids


def _index(centroids: np.ndarray) -> faiss.IndexFlatL2:
    """Exact search for the nearest centroid."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return index


def _read(vectors: np.ndarray | Vectors, ids: np.ndarray) -> np.ndarray:
    """Some vectors in memory, (B, E) float32; `ids` (B,) are ascending."""
    part = vectors.rows(ids) if isinstance(vectors, Vectors) else vectors[ids]
    return np.ascontiguousarray(part, dtype=np.float32)


def _bad_rows(vectors: np.ndarray) -> int:
    """How many of the vectors are not finite: faiss would give them the cluster -1."""
    return int((~np.isfinite(vectors).all(axis=1)).sum())


def _refuse_bad(bad: int, *, of: int) -> None:
    if bad:
        raise DataError(f"{bad} of {of} vectors are not finite: the encoder gave NaN or infinity")
