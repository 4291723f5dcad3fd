"""k-means against brute force, and the input it must refuse."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from megatron_specialm.base.errors import DataError
from megatron_specialm.clustering import kmeans
from megatron_specialm.clustering.encoders import fit_encoder
from megatron_specialm.clustering.kmeans import Centroids, KMeansResult, fit
from megatron_specialm.clustering.routers import assign
from megatron_specialm.clustering.vectors import unit_rows
from megatron_specialm.config.schema import TfidfEncoder
from megatron_specialm.data.clusters import concentration


def unit_vectors(windows: int, dimensions: int, *, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).normal(size=(windows, dimensions)))


def fitted(vectors: np.ndarray, *, k: int, seed: int = 0, sample: int = 10_000) -> KMeansResult:
    return fit(vectors, k=k, iterations=20, seed=seed, sample=sample)


def squared_distances(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return ((vectors[:, None, :] - centroids[None]) ** 2).sum(axis=2)


def test_assign_is_the_nearest_centroid_whatever_the_batch(tmp_path: Path) -> None:
    vectors, centroids = unit_vectors(500, 8), unit_vectors(7, 8, seed=1)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    expected = squared_distances(vectors, centroids).argmin(axis=1)
    for batch in (1, 64, 1_000):
        clusters = assign(mapped, Centroids(centroids), batch=batch)
        assert clusters.dtype == np.int32
        assert np.array_equal(clusters, expected)


def test_result_describes_the_fit() -> None:
    vectors = unit_vectors(500, 8)
    result = fitted(vectors, k=7)
    distances = squared_distances(vectors, result.centroids)
    assert result.centroids.shape == (7, 8)
    assert result.sizes.tolist() == np.bincount(distances.argmin(axis=1), minlength=7).tolist()
    assert result.inertia == pytest.approx(distances.min(axis=1).mean(), rel=1e-4)
    assert result.empty == 0


def test_one_cluster_is_the_mean_and_a_cluster_each_is_exact() -> None:
    vectors = unit_vectors(40, 8)
    np.testing.assert_allclose(fitted(vectors, k=1).centroids[0], vectors.mean(axis=0), atol=1e-6)
    assert fitted(vectors, k=40).inertia == pytest.approx(0, abs=1e-5)


def test_as_good_as_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    vectors = unit_vectors(2_000, 16)
    theirs = KMeans(16, n_init=1, init="random", max_iter=20, random_state=0).fit(vectors).inertia_ / len(vectors)
    assert fitted(vectors, k=16).inertia == pytest.approx(theirs, rel=0.02)


def test_same_seed_same_centroids_on_any_number_of_threads() -> None:
    vectors = unit_vectors(3_000, 32)
    before = faiss.omp_get_max_threads()
    results = []
    for threads in (1, 1, 2):
        faiss.omp_set_num_threads(threads)
        results.append(fitted(vectors, k=20, sample=2_000).centroids)
    faiss.omp_set_num_threads(before)
    assert np.array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], results[2], atol=1e-5)
    assert not np.array_equal(results[0], fitted(vectors, k=20, sample=2_000, seed=1).centroids)


def test_blocks_change_nothing_but_the_last_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit_vectors(1_000, 16)
    whole = fitted(vectors, k=5)
    monkeypatch.setattr(kmeans, "BLOCK", 64)
    blocks = fitted(vectors, k=5)
    np.testing.assert_allclose(blocks.centroids, whole.centroids, atol=1e-5)
    assert blocks.inertia == pytest.approx(whole.inertia, rel=1e-5)


def test_a_sum_is_the_same_whatever_is_added_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each cluster's vectors, to the last bit: ranks add their blocks in an order of their own."""
    monkeypatch.setattr(kmeans, "BLOCK", 64)
    rng = np.random.default_rng(0)
    # So far apart in size that sums in float64 would round, and differ by their order.
    vectors = (unit_vectors(640, 16) * 2.0 ** rng.integers(-45, 1, (640, 16))).astype(np.float32)
    centroids = unit_vectors(5, 16, seed=1)
    ahead = kmeans._Sample(vectors, np.arange(640), kmeans.Alone()).sums(centroids)
    backwards = kmeans._Sample(vectors.reshape(10, 64, 16)[::-1].reshape(640, 16), np.arange(640), kmeans.Alone())
    for one, other in zip(ahead, backwards.sums(centroids), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_draw_is_without_replacement_and_uniform() -> None:
    counts = np.zeros(50, int)
    for seed in range(400):
        rows = kmeans._draw(50, 10, seed=seed)
        assert len(set(rows.tolist())) == 10
        counts[rows] += 1
    assert counts.sum() == 4_000 and counts.min() > 40 and counts.max() < 125  # mean 80, standard deviation 8


def test_sample_bounds_what_is_fitted_on() -> None:
    assert fitted(unit_vectors(500, 8), k=5, sample=100).sizes.sum() == 100


def test_empty_clusters_are_counted() -> None:
    result = fitted(np.repeat(unit_vectors(3, 8), 20, axis=0), k=5)
    assert result.empty == 2
    assert sorted(result.sizes.tolist()) == [0, 0, 20, 20, 20]
    assert np.isfinite(result.centroids).all()


def test_refuses_more_clusters_than_vectors() -> None:
    with pytest.raises(DataError, match="k is 11, but there are 10 vectors"):
        fitted(unit_vectors(10, 4), k=11)
    with pytest.raises(DataError, match=r"k is 11, but there are 5 vectors to fit on \(of 20 windows; sample: 5\)"):
        fitted(unit_vectors(20, 4), k=11, sample=5)


def test_refuses_vectors_that_are_not_finite() -> None:
    vectors = unit_vectors(50, 4)
    vectors[7, 2], vectors[9, 0] = np.nan, np.inf
    with pytest.raises(DataError, match="2 of 50 vectors are not finite"):
        fitted(vectors, k=3)
    with pytest.raises(DataError, match="2 of 50 vectors are not finite"):
        assign(vectors, Centroids(unit_vectors(3, 4)))


def test_refuses_vectors_of_another_encoder() -> None:
    with pytest.raises(DataError, match="4 dimensions, the router 5"):
        assign(unit_vectors(10, 4), Centroids(unit_vectors(3, 5)))


def test_topics_are_recovered() -> None:
    rng = np.random.default_rng(0)
    topics = np.repeat(np.arange(4), 50)
    texts = [" ".join(f"word{topic}x{word}" for word in rng.integers(0, 30, 40)) for topic in topics]
    encoder = fit_encoder(TfidfEncoder(kind="tfidf", dimensions=8), lambda count: texts[:count], seed=0, threads=1)
    vectors = encoder.encode(texts)
    clusters = assign(vectors, Centroids(fitted(vectors, k=4, seed=2).centroids))
    assert len({(topic, cluster) for topic, cluster in zip(topics, clusters, strict=True)}) == 4
    assert len(set(clusters.tolist())) == 4


def test_concentration_of_one_cluster_and_of_equal_ones() -> None:
    alone, equal = concentration(np.array([0.0, 1.0, 0.0])), concentration(np.full(8, 1 / 8))
    assert (alone.top_share, alone.entropy, alone.effective_clusters) == (1, 0, 1)
    assert (equal.top_share, equal.entropy) == (1 / 8, pytest.approx(np.log(8)))
    assert equal.effective_clusters == pytest.approx(8)
