"""k-means: windows whose vectors have the same direction form one cluster.

Euclidean k-means on unit vectors, as in the paper. Their squared distance is 2 - 2 cos(angle), so it groups by direction. The
length of a centroid (at most 1) still measures how compact its cluster is; spherical k-means would lose it.

Lloyd's iterations give the same centroids, bit for bit, on any number of ranks. The sample is split into blocks independently
of the ranks, and one rank computes a block, always with the same operands and threads. Its contribution to a cluster's sum is
rounded to an integer number of units (`_Sample`), so that the order of additions does not matter.

Shapes: N windows, n fitted windows, K clusters, E dimensions of a vector. `vectors` may be `Vectors`, which are on disk.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import faiss
import numpy as np
from scipy.sparse import csr_matrix

from megatron_specialm.base.errors import DataError, MachineError
from megatron_specialm.clustering.vectors import Vectors, count_not_finite, read_rows, refuse_not_finite
from megatron_specialm.data.clusters import read_centroids
from megatron_specialm.data.permutation import shuffled

BLOCK = 16_384  # vectors that are searched and summed at a time
APART = 1 / 1024  # the centroids of a split cluster differ by this fraction of the old one (as in faiss)


class Ranks(Protocol):
    """The processes that cluster together. All of them call the same methods in the same order."""

    rank: int
    size: int

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over all ranks. Integer sums are exact and so do not depend on the number of ranks."""

    def largest(self, value: float) -> float:
        """The maximum over all ranks."""


class Alone:
    """A single process."""

    rank, size = 0, 1

    def total(self, values: np.ndarray) -> np.ndarray:
        return values

    def largest(self, value: float) -> float:
        return value


class MpiRanks:
    """The ranks of an MPI world."""

    def __init__(self) -> None:
        """Raises:
        MachineError: mpi4py cannot be used.
        """
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise MachineError(f"clustering over MPI ranks needs mpi4py ({error}): pip install mpi4py") from None
        self._world, self._largest = MPI.COMM_WORLD, MPI.MAX
        self.rank, self.size = self._world.rank, self._world.size

    def total(self, values: np.ndarray) -> np.ndarray:
        everything = np.empty_like(values)
        self._world.Allreduce(np.ascontiguousarray(values), everything)
        return everything

    def largest(self, value: float) -> float:
        return float(self._world.allreduce(value, op=self._largest))


@dataclass(frozen=True, eq=False)
class KMeansResult:
    """The centroids, and the statistics of the fitted windows:

    centroids: (K, E) float32.
    sizes: (K,) int64, the windows of each cluster.
    inertia: the mean squared distance to the nearest centroid.
    empty: the number of clusters without a window.
    """

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
    """Lloyd's algorithm on `sample` windows drawn without replacement, starting from K distinct windows. Each rank holds a part
    of the sample in memory; all ranks return the same result.

    An empty cluster gets half of the largest one. Clusters stay empty if there are fewer distinct vectors than clusters. The
    same seed and vectors give the same centroids on any number of ranks; with another number of threads, the BLAS library may
    add in another order.

    Args:
        vectors: (N, E) float32.
        ranks: the processes that fit together; default: this process only.
        counted: wraps the numbers of the iterations to report progress.

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
    centroids = read_rows(vectors, np.sort(rows[:k]))
    for _ in counted(range(iterations)):
        sums, sizes = sample_.sums(centroids)
        centroids = _split_for_empty(_means(sums, sizes, centroids), sizes)
    sizes, inertia = sample_.spread(centroids)
    return KMeansResult(centroids, sizes, inertia, int((sizes == 0).sum()))


class Centroids:
    """The router (clustering/routers.py) that assigns a vector to the nearest of K centroids (K, E) float32."""

    def __init__(self, centroids: np.ndarray) -> None:
        self._index = _index(centroids)
        self.dimensions: int = centroids.shape[1]
        self.flops_per_vector: int = 2 * centroids.size

    @classmethod
    def load(cls, folder: Path, k: int, dimensions: int) -> Self:
        return cls(read_centroids(folder, k=k, dimensions=dimensions))

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        nearest: np.ndarray = self._index.search(vectors, 1)[1][:, 0]
        return nearest


class _Sample:
    """The sample to fit on. Each rank holds a range of blocks; methods return results over all ranks."""

    def __init__(self, vectors: np.ndarray | Vectors, rows: np.ndarray, ranks: Ranks) -> None:
        """rows: (n,) ascending window numbers."""
        self._ranks, self._windows = ranks, len(rows)
        self._blocks = -(-len(rows) // BLOCK)
        self._own = range(self._blocks * ranks.rank // ranks.size, self._blocks * (ranks.rank + 1) // ranks.size)
        self._vectors = [read_rows(vectors, rows[block * BLOCK : (block + 1) * BLOCK]) for block in self._own]
        bad = sum(count_not_finite(part) for part in self._vectors)
        refuse_not_finite(int(ranks.total(np.array(bad))), of=len(rows))  # on all ranks, so that none waits for another
        largest = ranks.largest(max((float(np.abs(part).max()) for part in self._vectors), default=0.0))
        # The unit of the sums. A power of two keeps scaling exact; sums of n largest values do not overflow.
        self._unit = 2.0 ** (math.frexp(largest)[1] + len(rows).bit_length() - 62)

    def sums(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sum of the vectors of each cluster, (K, E) float64, and their number, (K,) int64."""
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
        """The number of vectors of each cluster, (K,) int64, and the mean squared distance to the nearest centroid."""
        index, sizes = _index(centroids), np.zeros(len(centroids), np.int64)
        distances = np.zeros(self._blocks)  # each block by one rank: adding zeros is exact
        for block, part in zip(self._own, self._vectors, strict=True):
            squared, nearest = index.search(part, 1)
            distances[block] = squared.sum(dtype=np.float64)
            sizes += np.bincount(nearest[:, 0], minlength=len(centroids))
        return self._ranks.total(sizes), math.fsum(self._ranks.total(distances)) / self._windows


def _draw(windows: int, count: int, *, seed: int) -> np.ndarray:
    """`count` window numbers without replacement, (n,) int64 in random order. Memory does not grow with N."""
    keys = np.full(count, seed % 2**64, np.uint64)
    return shuffled(np.arange(count), sizes=np.full(count, windows), keys=keys)


def _means(sums: np.ndarray, sizes: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The means of the clusters, (K, E) float32; an empty cluster keeps its centroid."""
    means = sums / np.maximum(sizes, 1)[:, None]
    return np.where(sizes[:, None] > 0, means, before).astype(np.float32)


def _split_for_empty(centroids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Give each empty cluster half of the largest one: place both centroids on opposite sides of the old one."""
    sizes = sizes.copy()
    shift = np.where(np.arange(centroids.shape[1]) % 2, 1 - APART, 1 + APART).astype(np.float32)
    for empty in np.flatnonzero(sizes == 0):
        largest = sizes.argmax()
        centroids[empty] = centroids[largest] * shift
        centroids[largest] *= 2 - shift
        sizes[empty] = sizes[largest] // 2
        sizes[largest] -= sizes[empty]
    return centroids


def _index(centroids: np.ndarray) -> faiss.IndexFlatL2:
    """Exact search for the nearest centroid."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    index.add(centroids)
    return index
