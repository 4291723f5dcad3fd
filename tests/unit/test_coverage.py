"""Whether the generic set has text like a domain's, by the distances of window vectors to centroids."""

from pathlib import Path

import numpy as np
import pytest

from megatron_specialm.base.artifacts import artifact_folder
from megatron_specialm.clustering.vectors import FILE, describe_vectors, unit_rows
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.data.clusters import CENTROIDS, OFFSETS, ORDER, order_type
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.report.coverage import coverage_warnings, relative_distances

CONFIG = """
name: coverage
root: run
text:
  generic: &files {train: t.txt, test: t.txt}
  domains: {same: *files, near: *files, far: *files, unread: *files}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 300}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  vectors: {kind: embed, tokens: tokens, encoder: {kind: tfidf}}
  clusters: {kind: cluster, vectors: vectors, k: 2}
  assignment: {kind: assign, clusters: clusters, vectors: vectors}
"""
# (E,) directions of the two clusters, which differ in how wide they are, and of what neither has.
CENTROIDS_KE = np.eye(4, dtype=np.float32)[:2]
WIDTHS = (0.1, 0.5)


def _windows(count: int, *, cluster: int, seed: int, beyond: float = 0.0) -> np.ndarray:
    """Unit vectors (count, E) around a centroid, moved in a direction that no generic window has."""
    noise = np.random.default_rng(seed).normal(size=(count, 4)) * [0, 0, WIDTHS[cluster], 0]
    return unit_rows(CENTROIDS_KE[cluster] + noise + [0, 0, 0, beyond])


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    return load_pipeline(Path("config.yaml"))


def _finished(pipeline: Pipeline) -> dict[TaskId, PlannedTask]:
    """A plan in which all is done, with files of the sets except `unread`."""
    plan = {name: PlannedTask(task, "d", "done", {}) for name, task in build_graph(pipeline).items()}
    generic = [_windows(300, cluster=0, seed=0), _windows(100, cluster=1, seed=1)]
    sets = {
        "generic": generic,
        "same": generic,
        "near": [_windows(0, cluster=0, seed=0), _windows(80, cluster=1, seed=2)],
        "far": [_windows(80, cluster=0, seed=3, beyond=0.1), _windows(0, cluster=1, seed=0)],
    }
    for name, parts in sets.items():
        vectors, assignment = (artifact_folder(Path("run"), stage, name, "d") for stage in ("vectors", "assignment"))
        for folder in (vectors, assignment):
            folder.mkdir(parents=True)
        np.save(vectors / FILE, np.concatenate(parts))
        describe_vectors(vectors)
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        np.save(assignment / ORDER, np.arange(offsets[-1], dtype=order_type(int(offsets[-1]))))
        np.save(assignment / OFFSETS, offsets)
    clusters = artifact_folder(Path("run"), "clusters", "generic", "d")
    clusters.mkdir(parents=True)
    np.save(clusters / CENTROIDS, CENTROIDS_KE)
    return plan


def test_a_domain_is_as_far_as_the_generic_windows_of_its_clusters_or_farther(pipeline: Pipeline) -> None:
    """Windows in the wide cluster are not far, and windows beside the narrow one are, though nearer to their centroid."""
    plan = _finished(pipeline)
    found = relative_distances(pipeline, plan, Path("run"))
    distances = {name.key: distance for name, distance in found.items()}
    assert list(distances) == ["same", "near", "far"], "the vectors of `unread` are not there"
    assert distances["same"] == pytest.approx(1.0)
    assert distances["near"] == pytest.approx(1.0, abs=0.25)
    assert distances["far"] > 1.5
    (warning,) = coverage_warnings(
        pipeline, {name: one for name, one in plan.items() if name.key != "near"}, Path("run")
    )
    assert warning.startswith("text.domains.far: the generic set has little text like it")


def test_what_is_not_assigned_yet_is_left_out(pipeline: Pipeline) -> None:
    plan = {name: PlannedTask(task, "d", "to do", {}) for name, task in build_graph(pipeline).items()}
    assert relative_distances(pipeline, plan, Path("run")) == {} == relative_distances(pipeline, {}, Path("run"))
