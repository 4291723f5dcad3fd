"""Routers: from the vector of a window to its cluster.

The cluster stage writes a router; the assign stage loads and applies it. `ROUTERS` has each kind by the file that holds it. To
add a kind, such as a trained classifier, write a class with the members of `Router` and add it there.

Shapes: N windows, B of them at a time, K clusters, E dimensions of a vector.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import REMAKE
from megatron_specialm.clustering.kmeans import BLOCK, Centroids
from megatron_specialm.clustering.vectors import Vectors, count_not_finite, read_rows, refuse_not_finite
from megatron_specialm.data.clusters import CENTROIDS


class Router(Protocol):
    """Assigns vectors to clusters."""

    @property
    def dimensions(self) -> int:
        """E, the length of its input vectors."""

    @property
    def flops_per_vector(self) -> int:
        """FLOPs per vector."""

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """The clusters (B,), integers in [0, K), of finite vectors (B, E) float32. A vector's cluster does not depend on the
        rest of the batch."""


# For each file that holds a router, its loader from (folder, K, E), which raises ArtifactError if the file does not fit.
ROUTERS: dict[str, Callable[[Path, int, int], Router]] = {CENTROIDS: Centroids.load}


def load_router(folder: Path, *, k: int, dimensions: int) -> Router:
    """Load the router that a cluster task wrote, for K clusters and vectors of `dimensions`.

    Raises:
        ArtifactError: the folder has no router, or it is damaged or of another shape.
    """
    for file, load in ROUTERS.items():
        if (folder / file).exists():
            return load(folder, k, dimensions)
    raise ArtifactError(f"{folder}: holds no router, which is one of {', '.join(ROUTERS)}: {REMAKE}")


def assign(
    vectors: np.ndarray | Vectors,
    router: Router,
    *,
    batch: int = BLOCK,
    counted: Callable[[Iterable[range]], Iterable[range]] = iter,
) -> np.ndarray:
    """The cluster of each vector, (N,) int32.

    Args:
        vectors: (N, E) float32.
        batch: the number of vectors in memory at a time.
        counted: wraps the batches' ranges of windows to report progress.

    Raises:
        DataError: the vectors have another length than the router's, or are not finite.
    """
    if vectors.shape[1] != router.dimensions:
        raise DataError(
            f"vectors have {vectors.shape[1]} dimensions, the router {router.dimensions}: they are of different encoders"
        )
    clusters = np.empty(len(vectors), dtype=np.int32)
    windows = range(len(vectors))
    for rows in counted(windows[start : start + batch] for start in windows[::batch]):
        part = read_rows(vectors, np.arange(rows.start, rows.stop))
        refuse_not_finite(count_not_finite(part), of=len(part))
        clusters[rows.start : rows.stop] = router.assign(part)
    return clusters
