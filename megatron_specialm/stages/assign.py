"""Each train window's cluster, and what they add up to, for one set.

clusters.npy             (N,) int32, the cluster of each window
histogram.npy            (K,) float64, the clusters' frequencies
order.npy, offsets.npy   the same by cluster: cluster c has the windows order[offsets[c]:offsets[c + 1]]
assign.json              k, windows, and how concentrated the set is
"""

from dataclasses import asdict

import faiss
import numpy as np

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.files import atomic_path, write_json
from megatron_specialm.clustering import kmeans
from megatron_specialm.clustering.concentration import concentration
from megatron_specialm.config.schema import AssignStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.clusters import ClusterIndex, histogram
from megatron_specialm.stages.context import Context


def run(stage: AssignStage, context: Context) -> Report:
    """Find the nearest centroid of every window. flops: 2 k E per window. It reads no tokens."""
    faiss.omp_set_num_threads(context.threads)
    vectors = np.load(context.artifact(stage.vectors, context.key) / "train.npy", mmap_mode="r", allow_pickle=False)
    centroids = np.load(context.artifact(stage.clusters, GENERIC) / "centroids.npy", allow_pickle=False)
    k = len(centroids)
    clusters = kmeans.assign(vectors, centroids)
    index = ClusterIndex.from_assignment(clusters, k=k)
    assert index.order is not None  # None for a single cluster that nobody assigned only
    frequencies = histogram(clusters, k=k)
    arrays = {"clusters": clusters, "histogram": frequencies, "order": index.order, "offsets": index.offsets}
    for name, array in arrays.items():
        with atomic_path(context.folder / f"{name}.npy") as path, path.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    values = {"k": k, "windows": len(clusters), **asdict(concentration(frequencies))}
    write_json(context.folder / "assign.json", values)
    return Report(flops=2 * vectors.size * k, values=values)
