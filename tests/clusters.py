"""An index of clusters in memory, made as the assign stage makes it in files."""

import numpy as np

from megatron_specialm.data.clusters import ClusterIndex, order_type, sort_by_cluster


def cluster_index(clusters: np.ndarray, *, k: int) -> ClusterIndex:
    """Index cluster ids (N,) of the windows 0 ... N - 1."""
    order = np.empty(len(clusters), order_type(len(clusters)))
    return ClusterIndex(order, sort_by_cluster([clusters], order, k=k))
