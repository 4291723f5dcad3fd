"""The cluster of each training window of a set, and the set's histogram of clusters. The key `generic.validation` is for the
held-out windows of the generic set.

clusters.npy             (N,) int32, the cluster of each window; for a set in shards, each shard has its own
histogram.npy            (K,) float64, frequencies of the clusters
order.npy, offsets.npy   windows by cluster: cluster c has the windows order[offsets[c]:offsets[c + 1]]
assign.json              k, windows, and the concentration of the set (data/clusters.py)
"""

from dataclasses import asdict
from pathlib import Path

import faiss
import numpy as np

from megatron_specialm.base.arrays import new_array, write_array
from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.files import write_json
from megatron_specialm.clustering.routers import assign, load_router
from megatron_specialm.clustering.vectors import Vectors
from megatron_specialm.config.schema import AssignStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.clusters import (
    CLUSTERS,
    HISTOGRAM,
    OFFSETS,
    ORDER,
    concentration,
    order_type,
    read_clusters,
    sort_by_cluster,
)
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.lineage import HELD_OUT, cluster_count, shard_keys


def run(stage: AssignStage, context: Context) -> Report:
    """Assign the windows of a set or shard to clusters, and index a set's windows by cluster. It reads no tokens."""
    shards = [] if context.task.shard or context.key == HELD_OUT else shard_keys(context.pipeline, context.key)
    if shards:
        return Report(values=_index(context, [context.artifact(context.task.id.stage, key) for key in shards]))
    report = _assign(stage, context)
    return report if context.task.shard else Report(flops=report.flops, values=_index(context, [context.folder]))


def _assign(stage: AssignStage, context: Context) -> Report:
    """flops: those of the router."""
    faiss.omp_set_num_threads(context.threads)
    vectors = Vectors(context.artifact(stage.vectors, context.key))
    k = cluster_count(context.pipeline, context.task.id.stage)
    router = load_router(context.artifact(stage.clusters, GENERIC), k=k, dimensions=vectors.shape[1])
    clusters = assign(
        vectors, router, counted=lambda parts: context.counted(parts, unit="windows", of=len(vectors), size=len)
    )
    write_array(context.folder / CLUSTERS, clusters)
    return Report(flops=len(vectors) * router.flops_per_vector, values={"windows": len(vectors)})


def _index(context: Context, folders: list[Path]) -> dict[str, object]:
    """Index the clusters in these folders as one set; returns the values of the report."""
    k = cluster_count(context.pipeline, context.task.id.stage)
    parts = [read_clusters(folder, k=k) for folder in folders]
    windows = sum(map(len, parts))
    with new_array(context.folder / ORDER, dtype=order_type(windows), shape=(windows,)) as order:
        offsets = sort_by_cluster(parts, order, k=k)
    write_array(context.folder / OFFSETS, offsets)
    frequencies = np.diff(offsets) / windows
    write_array(context.folder / HISTOGRAM, frequencies)
    values = {"k": k, "windows": windows, **asdict(concentration(frequencies))}
    write_json(context.folder / "assign.json", values)
    return values
