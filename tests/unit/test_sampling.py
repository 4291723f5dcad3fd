import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_specialm.base.errors import DataError
from megatron_specialm.data import clusters as data_clusters
from megatron_specialm.data.clusters import ClusterIndex, importance_weights, order_type, sort_by_cluster
from megatron_specialm.data.permutation import shuffled
from megatron_specialm.data.sampling import ImportanceStream
from tests.clusters import cluster_index


def _index(sizes: list[int]) -> ClusterIndex:
    return cluster_index(np.repeat(np.arange(len(sizes)), sizes), k=len(sizes))


def _stream(sizes: list[int], weights: object, *, batch: int = 8, seed: int = 0) -> ImportanceStream:
    return ImportanceStream(_index(sizes), weights, global_batch_size=batch, seed=seed)  # type: ignore[arg-type]


def _read(stream: ImportanceStream, steps: int) -> np.ndarray:
    return np.concatenate([stream.draw(step).window_ids for step in range(steps)])


def _clusters(stream: ImportanceStream, step: int) -> np.ndarray:
    return stream.draw_steps(range(step, step + 1))[1]


# --- reductions ---------------------------------------------------------------------------------------------------------


def test_one_cluster_is_plain_pretraining() -> None:
    """Every window once per epoch, in an order that changes."""
    stream = ImportanceStream(ClusterIndex.single(64), np.ones(1), global_batch_size=8, seed=0)
    first, second = _read(stream, 8), np.concatenate([stream.draw(step).window_ids for step in range(8, 16)])
    assert sorted(first) == sorted(second) == list(range(64))
    assert not np.array_equal(first, second) and not np.array_equal(first, np.arange(64))


def test_target_equal_to_generic_is_uniform() -> None:
    sizes = np.array([10, 40, 150])
    weights, lost = importance_weights(sizes / sizes.sum(), sizes)
    np.testing.assert_allclose(weights / sizes, 1 / sizes.sum())
    assert lost == 0.0


def test_the_draws_histogram_is_the_targets() -> None:
    target = np.array([2, 1, 3, 0])
    weights, _ = importance_weights(target, np.array([500, 500, 500, 500]))
    stream = _stream([500] * 4, weights, batch=12)
    drawn = np.concatenate([_clusters(stream, step) for step in range(10)])
    np.testing.assert_array_equal(np.bincount(drawn, minlength=4), 20 * target)


def test_windows_are_sorted_by_cluster_in_blocks_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_clusters, "BLOCK", 64)
    clusters = np.random.default_rng(0).integers(0, 9, 1_000).astype(np.int32)
    clusters[clusters == 4] = 5  # one that holds none
    order = np.empty(1_000, order_type(1_000))
    offsets = sort_by_cluster([clusters[:130], clusters[130:131], clusters[131:]], order, k=9)
    np.testing.assert_array_equal(order, np.argsort(clusters, kind="stable"))
    np.testing.assert_array_equal(np.diff(offsets), np.bincount(clusters, minlength=9))


def test_mass_on_empty_clusters_is_lost_and_said() -> None:
    weights, lost = importance_weights(np.array([0.25, 0.25, 0.5]), np.array([5, 0, 5]))
    assert lost == 0.25
    np.testing.assert_allclose(weights, [1 / 3, 0, 2 / 3])


# --- properties ---------------------------------------------------------------------------------------------------------

weights_of = st.one_of(
    st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda values: sum(values) > 1e-6),
    st.integers(1, 30).map(lambda k: [2.0**-j for j in range(k)]),
    st.integers(2, 60).map(lambda k: [1.0, *[1e-6] * (k - 1)]),
)


@settings(deadline=None, max_examples=60)
@given(weights=weights_of, batch=st.integers(1, 40), steps=st.integers(1, 60))
def test_counts_never_drift_by_more_than_two_windows(weights: list[float], batch: int, steps: int) -> None:
    stream = _stream([3] * len(weights), np.array(weights), batch=batch)
    drawn = np.concatenate([_clusters(stream, step) for step in range(steps)])
    share = np.array(weights) / sum(weights)
    counts = np.cumsum(drawn[:, None] == np.arange(len(weights)), axis=0)
    expected = np.arange(1, len(drawn) + 1)[:, None] * share
    assert np.abs(counts - expected).max() <= 2
    np.testing.assert_array_equal(counts[-1], stream.counts(steps))


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    raw=st.lists(st.floats(0.01, 1), min_size=8, max_size=8),
    seed=st.integers(0, 2**31),
)
def test_no_window_repeats_before_all_of_its_cluster_were_used(sizes: list[int], raw: list[float], seed: int) -> None:
    stream = _stream(sizes, np.array(raw[: len(sizes)]), seed=seed)
    ids, clusters = _read(stream, 30), np.concatenate([_clusters(stream, step) for step in range(30)])
    offsets = np.cumsum([0, *sizes])
    for cluster, size in enumerate(sizes):
        own = ids[clusters == cluster]
        assert ((own >= offsets[cluster]) & (own < offsets[cluster + 1])).all()
        for start in range(0, len(own), size):
            epoch = own[start : start + size]
            assert len(set(epoch)) == len(epoch)


@settings(deadline=None, max_examples=30)
@given(batch=st.sampled_from([1, 2, 4, 8, 16]), raw=st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_the_order_of_draws_does_not_depend_on_the_batch_size(batch: int, raw: list[float]) -> None:
    weights = np.array(raw) + 0.1
    one = _read(_stream([7, 20, 3, 50], weights, batch=batch), 32 // batch)
    np.testing.assert_array_equal(one, _read(_stream([7, 20, 3, 50], weights, batch=32), 1))


@settings(deadline=None, max_examples=30)
@given(change=st.integers(1, 15))
def test_a_change_of_weights_skips_and_repeats_nothing(change: int) -> None:
    sizes = [64, 64]
    phases = [(0, np.array([0.9, 0.1])), (change, np.array([0.2, 0.8]))]
    stream = _stream(sizes, phases, batch=4)
    ids = _read(stream, 16)  # 64 draws: no cluster can have been through
    assert len(set(ids)) == 64
    np.testing.assert_array_equal(ids[: 4 * change], _read(_stream(sizes, phases[0][1], batch=4), change))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_the_order_is_a_permutation(size: int) -> None:
    for key in (0, 1, 2**63):
        places = np.arange(size)
        order = shuffled(places, sizes=np.full(size, size), keys=np.full(size, key, np.uint64))
        assert sorted(order) == list(range(size))


def test_the_order_is_well_shuffled() -> None:
    """First places over many keys are uniform (chi-square, 15 degrees of freedom, p = 1e-5: 49)."""
    keys = np.arange(16_000, dtype=np.uint64)
    first = shuffled(np.zeros(len(keys), np.int64), sizes=np.full(len(keys), 16), keys=keys)
    assert ((np.bincount(first, minlength=16) - 1000.0) ** 2 / 1000).sum() < 49


# --- at scale, and far on -----------------------------------------------------------------------------------------------


def test_any_step_is_the_same_price_and_exact_far_on() -> None:
    weights = np.random.default_rng(0).dirichlet(np.full(1024, 0.05))
    stream = ImportanceStream(
        ClusterIndex(None, np.arange(1025, dtype=np.int64) * 300_000), weights, global_batch_size=512, seed=0
    )
    far = 2_000_000  # a billion draws
    before, after = stream.counts(far), stream.counts(far + 1)
    drawn = np.bincount(_clusters(stream, far), minlength=1024)
    np.testing.assert_array_equal(after - before, drawn)
    assert np.abs(before - far * 512 * weights).max() <= 2
    assert len(np.unique(stream.draw(far).window_ids)) == 512


def test_seeds_differ() -> None:
    assert not np.array_equal(
        _stream([64], np.ones(1), seed=0).draw(0).window_ids, _stream([64], np.ones(1), seed=1).draw(0).window_ids
    )


# --- the report ---------------------------------------------------------------------------------------------------------


def test_report() -> None:
    report = _stream([100, 10], np.array([0.5, 0.5]), batch=10).report(10)
    assert report.windows_drawn == 100
    np.testing.assert_allclose(report.expected_repeats, [0.5, 5.0])
    assert report.effective_sample_size == pytest.approx(1 / (0.25 / 100 + 0.25 / 10))
    assert len(report.warnings) == 1 and "5.0" in report.warnings[0]
    uniform = _stream([100, 10], np.array([100, 10])).report(1)
    assert uniform.effective_sample_size == pytest.approx(110) and not uniform.warnings


@pytest.mark.parametrize(
    ("sizes", "weights", "says"),
    [
        ([4, 4], np.array([1.0]), "1"),
        ([4, 4], np.array([-1.0, 2.0]), "-1"),
        ([4, 4], np.array([np.nan, 1.0]), "nan"),
        ([4, 4], np.zeros(2), "are zero"),
        ([4, 0, 4], np.array([0.5, 0.2, 0.3]), "no windows"),
        ([4, 4], [(1, np.ones(2))], "first must be 0"),
        ([4, 4], [(0, np.ones(2)), (0, np.ones(2))], "later than"),
    ],
)
def test_bad_weights(sizes: list[int], weights: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        _stream(sizes, weights)


def test_bad_steps_and_batches() -> None:
    with pytest.raises(DataError, match="global_batch_size is 0"):
        _stream([4], np.ones(1), batch=0)
    with pytest.raises(DataError, match="step is -1"):
        _stream([4], np.ones(1)).draw(-1)
