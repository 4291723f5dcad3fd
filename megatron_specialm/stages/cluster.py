"""k-means on the generic set's vectors.

centroids.npy   (K, E) float32
clusters.json   of the fit: k, vectors, inertia, empty clusters, smallest and largest size

Under MPI every rank fits on its part of the sample, and rank 0 writes.
"""

import logging

import faiss

from megatron_specialm.base.arrays import write_array
from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.errors import DataError
from megatron_specialm.base.files import write_json
from megatron_specialm.clustering import kmeans
from megatron_specialm.clustering.kmeans import Alone, MpiRanks
from megatron_specialm.clustering.vectors import Vectors
from megatron_specialm.config.schema import ClusterStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.clusters import CENTROIDS
from megatron_specialm.graph.context import Context

logger = logging.getLogger(__name__)


def run(stage: ClusterStage, context: Context) -> Report:
    """Fit k centroids. flops: 2 k E per vector, for each iteration and the final count. It reads no tokens.

    Raises:
        DataError: there are fewer windows than clusters, or so few different vectors that half of the clusters are empty.
    """
    faiss.omp_set_num_threads(context.threads)
    result = kmeans.fit(
        Vectors(context.artifact(stage.vectors, GENERIC)),
        k=stage.k,
        iterations=stage.iterations,
        seed=context.pipeline.seed,
        sample=stage.sample,
        ranks=MpiRanks() if context.world.is_mpi else Alone(),
        counted=lambda rounds: context.counted(rounds, unit="iterations", of=stage.iterations),
    )
    fitted = int(result.sizes.sum())
    _check_different(result, fitted)
    values = {
        "k": stage.k,
        "vectors": fitted,
        "inertia": result.inertia,
        "empty_clusters": result.empty,
        "smallest_cluster": int(result.sizes.min()),
        "largest_cluster": int(result.sizes.max()),
    }
    if context.world.is_first:
        write_array(context.folder / CENTROIDS, result.centroids)
        write_json(context.folder / "clusters.json", values)
    return Report(flops=2 * result.centroids.size * fitted * (stage.iterations + 1), values=values)


def _check_different(result: kmeans.KMeansResult, fitted: int) -> None:
    """Reject or warn about empty clusters: there are fewer different vectors than clusters."""
    k = len(result.sizes)
    found = f"{result.empty} of {k} clusters are empty: the {fitted} vectors that were fitted on point in too few directions"
    if 2 * result.empty >= k:
        raise DataError(f"{found}: use fewer clusters (k), more or other generic text, or another encoder")
    if result.empty:
        logger.warning("%s for k = %d", found, k)
