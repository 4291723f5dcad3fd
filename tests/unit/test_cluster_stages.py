"""The stages embed, cluster and assign, run one after another as the graph orders them."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import numpy as np
import pytest

from megatron_specialm.base import process_status as counting
from megatron_specialm.base.artifacts import Report, begin_artifact
from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.clustering.routers import ROUTERS
from megatron_specialm.clustering.vectors import Vectors
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.data.clusters import ClusterIndex, importance_weights
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.stages import assign, cluster, embed
from tests.contexts import make_context

TOPICS, WINDOWS = 4, 60  # windows per topic
RUN = {"embed": embed.run, "cluster": cluster.run, "assign": assign.run}


class CharacterStore:
    """A token store whose tokens are characters, so that these tests need neither tokenizer nor token files."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self.tokens = sum(map(len, texts))

    @classmethod
    def open(cls, folder: Path, split: str) -> Self:
        return cls(read_json(folder / f"{split}.json"))

    def __len__(self) -> int:
        return len(self._texts)

    def window(self, i: int) -> np.ndarray:
        return np.array([ord(character) for character in self._texts[i]])


def decode(ids: np.ndarray) -> str:
    return "".join(map(chr, ids))


def topic_texts(topics: list[int], *, seed: int) -> list[str]:
    """One text per entry, of words that its topic alone has."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"word{topic}x{word}" for word in rng.integers(0, 30, 40)) for topic in topics]


GENERIC_TOPICS = [topic for topic in range(TOPICS) for _ in range(WINDOWS)]
TEXTS = {
    "generic": topic_texts(GENERIC_TOPICS, seed=0),
    "law": topic_texts([1] * 20, seed=1),
    "both": topic_texts([0] * 30 + [2] * 10, seed=2),
    "same": topic_texts(GENERIC_TOPICS, seed=3),
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    return Pipeline.model_validate(
        {
            "name": "clusters",
            "root": str(tmp_path),
            "seed": 2,
            "text": {"generic": files, "domains": {name: files for name in TEXTS if name != "generic"}},
            "stages": {
                "tokenizer": {"kind": "tokenizer"},
                "tokens": {"kind": "tokenize", "tokenizer": "tokenizer"},
                "vectors": {"kind": "embed", "tokens": "tokens", "encoder": {"kind": "tfidf", "dimensions": 8}},
                "clusters": {"kind": "cluster", "vectors": "vectors", "k": TOPICS},
                "assignment": {"kind": "assign", "clusters": "clusters", "vectors": "vectors"},
            },
        }
    )


@pytest.fixture
def reports(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[TaskId, Report]:
    """The reports of all tasks, run into `tmp_path`."""
    return run_all(pipeline, tmp_path, monkeypatch, TEXTS)


def run_all(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: dict[str, list[str]]
) -> dict[TaskId, Report]:
    """Run all tasks. The batch is so small that there are several."""
    monkeypatch.setattr(embed, "TokenStore", CharacterStore)
    monkeypatch.setattr(embed, "Tokenizer", SimpleNamespace(load=lambda folder: SimpleNamespace(decode=decode)))
    monkeypatch.setattr(embed, "BATCH", 50)
    for source, texts in sets.items():
        write_json(tmp_path / "tokens" / source / "train.json", texts)
    done = {}
    for task in build_graph(pipeline).values():
        stage = pipeline.stages[task.id.stage]
        if stage.kind in RUN:
            folder = begin_artifact(tmp_path, *task.id, digest="test")
            done[task.id] = RUN[stage.kind](stage, make_context(pipeline, task, tmp_path, folder))
    return done


def load(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.npy", allow_pickle=False)


def test_vectors(reports: dict[TaskId, Report], tmp_path: Path) -> None:
    for source, texts in TEXTS.items():
        vectors = load(tmp_path / "vectors" / source, "train")
        assert np.array_equal(Vectors(tmp_path / "vectors" / source).rows(np.arange(len(texts))), vectors)
        assert (vectors.dtype, vectors.shape) == (np.float32, (len(texts), 8))
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
        characters = sum(map(len, texts))
        assert (reports[TaskId("vectors", source)].tokens, reports[TaskId("vectors", source)].flops) == (
            characters,
            characters * 2 * 8,
        )


def test_each_says_how_far_it_is(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(counting, "COUNT_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    run_all(pipeline, tmp_path, monkeypatch, TEXTS)
    for told in ("50 of 240 windows, ", "240 of 240 windows, ", "1 of 20 iterations, ", "20 of 20 iterations, "):
        assert told in caplog.text
    assert caplog.text.count("20 of 20 windows, ") == 2, "embed and assign, of the set of 20"
    assert not list(tmp_path.rglob(counting.PROGRESS))


def test_windows_of_which_nothing_is_known_are_counted(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whitespace, and words that the generic set does not have."""
    sets = {**TEXTS, "law": [*TEXTS["law"], " \n", "strange"]}
    reports = run_all(pipeline, tmp_path, monkeypatch, sets)
    assert reports[TaskId("vectors", "law")].values["zero_vectors"] == 2
    assert reports[TaskId("vectors", "both")].values["zero_vectors"] == 0
    with pytest.raises(DataError, match=r"text 'law': the encoder knows nothing of 22 of 42 windows"):
        run_all(pipeline, tmp_path, monkeypatch, {**TEXTS, "law": [*TEXTS["law"], *["strange"] * 22]})


def test_fewer_different_windows_than_clusters(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = (TEXTS["generic"][topic * WINDOWS] for topic in range(3))

    def run(texts: list[str]) -> None:
        run_all(pipeline, tmp_path, monkeypatch, dict.fromkeys(TEXTS, texts))

    run([*[first] * 20, *[second] * 20, third])
    assert "1 of 4 clusters are empty: the 41 vectors" in caplog.text
    with pytest.raises(DataError, match=r"2 of 4 clusters are empty: .*use fewer clusters"):
        run([*[first] * 20, *[second] * 20])


def test_clusters_are_the_topics(reports: dict[TaskId, Report], tmp_path: Path) -> None:
    clusters = load(tmp_path / "assignment" / "generic", "clusters")
    assert clusters.dtype == np.int32
    assert len(set(zip(GENERIC_TOPICS, clusters.tolist(), strict=True))) == TOPICS
    assert load(tmp_path / "clusters" / "generic", "centroids").shape == (TOPICS, 8)
    report = read_json(tmp_path / "clusters" / "generic" / "clusters.json")
    assert (report["k"], report["vectors"], report["empty_clusters"]) == (TOPICS, len(GENERIC_TOPICS), 0)
    assert (report["smallest_cluster"], report["largest_cluster"]) == (WINDOWS, WINDOWS)


def test_index_is_of_the_clusters(reports: dict[TaskId, Report], tmp_path: Path) -> None:
    folder = tmp_path / "assignment" / "both"
    clusters, index = load(folder, "clusters"), ClusterIndex(load(folder, "order"), load(folder, "offsets"))
    for c in range(TOPICS):
        assert sorted(index.order[index.offsets[c] : index.offsets[c + 1]]) == np.flatnonzero(clusters == c).tolist()


class LinearRouter:
    """The cluster with the largest score x W + b: what a classifier that was trained elsewhere may be."""

    def __init__(self, folder: Path, k: int, dimensions: int) -> None:
        self._weights, self._bias = load(folder, "weights"), load(folder, "bias")
        assert self._weights.shape == (dimensions, k)
        self.dimensions, self.flops_per_vector = dimensions, 2 * self._weights.size

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors @ self._weights + self._bias).argmax(axis=1)


def test_a_router_of_another_kind_is_an_entry_in_the_table(
    pipeline: Pipeline, reports: dict[TaskId, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 c x - |c|^2 is largest for the nearest centroid c, so this one gives the clusters of k-means."""
    clusters = tmp_path / "clusters" / "generic"
    centroids, expected = load(clusters, "centroids"), load(tmp_path / "assignment" / "both", "clusters")
    (clusters / "centroids.npy").unlink()
    np.save(clusters / "weights.npy", 2 * centroids.T)
    np.save(clusters / "bias.npy", -(centroids**2).sum(axis=1))
    task = build_graph(pipeline)[TaskId("assignment", "both")]
    context = make_context(pipeline, task, tmp_path, begin_artifact(tmp_path, *task.id, digest="linear"))
    with pytest.raises(ArtifactError, match=r"holds no router, which is one of centroids\.npy"):
        assign.run(pipeline.stages["assignment"], context)
    monkeypatch.setitem(ROUTERS, "weights.npy", LinearRouter)
    report = assign.run(pipeline.stages["assignment"], context)
    np.testing.assert_array_equal(load(context.folder, "clusters"), expected)
    assert report.flops == reports[task.id].flops


def test_domains_are_told_apart(reports: dict[TaskId, Report], tmp_path: Path) -> None:
    law, both = (read_json(tmp_path / "assignment" / name / "assign.json") for name in ("law", "both"))
    assert law == {"k": TOPICS, "windows": 20, "top_share": 1.0, "entropy": 0.0, "effective_clusters": 1.0}
    assert both["top_share"] == 0.75
    assert both["entropy"] == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    assert both["effective_clusters"] == pytest.approx(np.exp(both["entropy"]))
    assert reports[TaskId("assignment", "law")].values == law


def test_a_domain_like_the_generic_set_is_drawn_uniformly(reports: dict[TaskId, Report], tmp_path: Path) -> None:
    """Importance sampling reduces to plain pretraining: every window has the same chance."""
    generic, same = tmp_path / "assignment" / "generic", tmp_path / "assignment" / "same"
    target, sizes = load(same, "histogram"), np.diff(load(generic, "offsets"))
    assert target.dtype == np.float64
    assert np.array_equal(target, load(generic, "histogram"))
    weights, lost = importance_weights(target, sizes)
    np.testing.assert_allclose(weights / sizes, 1 / len(GENERIC_TOPICS))
    assert lost == 0


def test_embedding_reads_the_tokenizer(pipeline: Pipeline) -> None:
    graph = build_graph(pipeline)
    assert graph[TaskId("vectors", "law")].inputs == (
        TaskId("vectors", "generic.encoder"),
        TaskId("tokenizer", "generic"),
        TaskId("tokens", "law"),
    )
