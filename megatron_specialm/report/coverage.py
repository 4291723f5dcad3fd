"""Whether the generic set has text like a domain's. Methods that learn from the generic text's clusters (SLM-is, SLM-pn,
SLM-mix) gain little for a domain that it does not cover, however concentrated that domain is in one of them.

The measure is the mean squared distance of a domain's window vectors to their clusters' centroids, relative to that of the
generic windows in the same clusters. docs/methods.md has what it was on text that the generic set has, and on text that it has
not.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_specialm.base.artifacts import artifact_folder
from megatron_specialm.clustering.vectors import DESCRIPTION, Vectors, read_rows, unit_rows
from megatron_specialm.config.schema import AssignStage, Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.clusters import read_centroids, read_index
from megatron_specialm.graph.lineage import cluster_count
from megatron_specialm.graph.plan import Plan
from megatron_specialm.graph.tasks import TaskId

SAMPLE = 10_000  # windows of a set, evenly spaced in the order of clusters
NOT_COVERED = 1.02  # a relative distance above this


def relative_distances(pipeline: Pipeline, plan: Plan, root: Path) -> dict[TaskId, float]:
    """The relative distance of each domain whose windows are assigned, by the task that assigned them. Domains are left out if
    an artifact that is read for it is not there.

    Raises:
        ArtifactError: a file is damaged.
    """
    found = {}
    for name, stage in pipeline.stages.items():
        if not isinstance(stage, AssignStage):
            continue
        generic = _squared_distances(pipeline, plan, root, name, stage, GENERIC)
        if generic is None:
            continue
        k = cluster_count(pipeline, name)
        counts, sums = (np.bincount(generic[0], weights, minlength=k) for weights in (None, generic[1]))
        # Of a cluster without a window in the sample: the mean of all.
        means_K = np.where(counts > 0, sums / np.maximum(counts, 1), generic[1].mean())
        for domain in pipeline.text.domains:
            own = _squared_distances(pipeline, plan, root, name, stage, domain)
            if own is not None and (expected := means_K[own[0]].sum()) > 0:
                found[TaskId(name, domain)] = float(own[1].sum() / expected)
    return found


def _squared_distances(
    pipeline: Pipeline, plan: Plan, root: Path, name: str, stage: AssignStage, source: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a sample of a set's windows: the clusters (n,), and the squared distances (n,) of the unit vectors to their centroids.
    None where something is not there."""
    k = cluster_count(pipeline, name)
    tasks = TaskId(stage.vectors, source), TaskId(stage.clusters, GENERIC), TaskId(name, source)
    if any(task not in plan or plan[task].is_to_do for task in tasks):
        return None
    folders = [artifact_folder(plan[task].elsewhere or root, *task, plan[task].digest) for task in tasks]
    if not (folders[0] / DESCRIPTION).exists():
        return None
    vectors, centroids_KE = Vectors(folders[0]), read_centroids(folders[1], k=k)
    index = read_index(folders[2], windows=len(vectors), k=k)
    places = np.unique(np.linspace(0, len(vectors) - 1, min(SAMPLE, len(vectors)), dtype=np.int64))
    assert index.order is not None  # only in memory
    ids, own = np.asarray(index.order[places]), np.searchsorted(index.offsets, places, side="right") - 1
    ids, own = np.sort(ids), own[np.argsort(ids)]
    return own, np.square(unit_rows(read_rows(vectors, ids)) - centroids_KE[own]).sum(axis=1, dtype=np.float64)


def coverage_warnings(pipeline: Pipeline, plan: Plan, root: Path) -> Iterator[str]:
    """A warning for each domain that is far from the generic text in every clustering."""
    found: dict[str, list[float]] = {}
    for name, distance in relative_distances(pipeline, plan, root).items():
        found.setdefault(name.key, []).append(distance)
    for domain, distances in found.items():
        if min(distances) > NOT_COVERED:
            yield (
                f"text.domains.{domain}: the generic set has little text like it: its windows are {min(distances):.2f} times "
                "as far from their clusters' centroids as generic ones are (squared). Methods that choose generic text or "
                "experts by cluster gain little for it: add such text to the generic set, or compare with `slm`"
            )
