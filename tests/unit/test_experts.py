"""The order of reading for many experts, two stores read as one, and how long an expert trains."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.config.training import Soup
from megatron_specialm.data.batches import TrainingBatches
from megatron_specialm.data.clusters import ClusterIndex
from megatron_specialm.data.experts import ExpertStream, check_enough, expert_steps, soups_before
from megatron_specialm.data.sampling import ImportanceStream
from megatron_specialm.data.store import MIXTURE, JoinedStore, StoreWriter, TokenStore, describe_store
from tests.clusters import cluster_index

SIZES = [40, 100, 12, 248]
CLUSTERS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), SIZES))
INDEX = cluster_index(CLUSTERS, k=4)


def _stream(soup: Soup | None = None, *, seed: int = 0) -> ExpertStream:
    return ExpertStream(INDEX, global_batch_size=32, windows_per_expert=4, soup=soup, seed=seed)


def _mixtures(stream: ExpertStream, step: int) -> np.ndarray:
    mixtures = stream.draw(step).mixtures
    assert mixtures is not None
    return mixtures


def test_groups_are_of_one_cluster_and_its_expert() -> None:
    stream = _stream()
    for step in range(20):
        windows, mixtures = stream.draw(step)
        assert mixtures is not None
        groups = CLUSTERS[windows].reshape(-1, 4)
        assert (groups == groups[:, :1]).all()
        np.testing.assert_array_equal(mixtures.argmax(1), CLUSTERS[windows])
        assert set(np.unique(mixtures)) == {0.0, 1.0} and (mixtures.sum(1) == 1).all()


def test_clusters_come_as_often_as_they_are_large_and_every_window_once() -> None:
    windows = np.concatenate([_stream().draw(step).window_ids for step in range(100)])
    shares = np.bincount(CLUSTERS[windows], minlength=4) / len(windows)
    np.testing.assert_allclose(shares, np.array(SIZES) / 400, atol=8 / len(windows))
    counts = np.bincount(windows, minlength=400)
    for cluster in range(4):  # before a window comes again, all of its cluster have come
        own = counts[cluster == CLUSTERS]
        assert own.max() - own.min() <= 1


def test_one_window_in_a_row_is_the_importance_stream() -> None:
    plain = ImportanceStream(INDEX, np.array(SIZES), global_batch_size=32, seed=5)
    stream = ExpertStream(INDEX, global_batch_size=32, windows_per_expert=1, soup=None, seed=5)
    np.testing.assert_array_equal(plain.draw(7).window_ids, stream.draw(7).window_ids)
    assert plain.draw(7).mixtures is None


@pytest.mark.parametrize("soup", [None, Soup(fraction=0.5)])
def test_a_step_is_drawn_at_once_and_once(soup: Soup | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for it: a search for each group cost a step of 512 windows 14 ms for 1."""
    searches: list[int] = []
    real = ImportanceStream.draw_steps

    def counted(self: ImportanceStream, steps: range) -> tuple[np.ndarray, np.ndarray]:
        searches.append(len(steps))
        return real(self, steps)

    monkeypatch.setattr(ImportanceStream, "draw_steps", counted)
    store, stream = _store(tmp_path / "store", 0, tokens=1600), _stream(soup)
    batches = [TrainingBatches(store, stream, rank=rank, processes=2).local(3) for rank in range(2)]
    assert searches == [8 if soup is None else 4] * 2  # once per process
    window_ids, mixtures = stream.draw(3)
    np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in batches]), store.batch(window_ids).tokens)
    np.testing.assert_array_equal(np.concatenate([batch.extra_inputs[MIXTURE] for batch in batches]), mixtures)


def test_soup_groups_are_drawn_from_the_histogram_that_computes_them() -> None:
    stream = _stream(Soup(fraction=0.5, clusters=3))
    mixed = drawn = 0
    seen, expected = np.zeros(4), np.zeros(4)
    for step in range(300):
        mixtures, windows = _mixtures(stream, step).reshape(-1, 4, 4), stream.draw(step).window_ids.reshape(-1, 4)
        assert (mixtures == mixtures[:, :1]).all()  # a group shares its mixture
        np.testing.assert_allclose(mixtures.sum(-1), 1, rtol=1e-5)
        for mixture, group in zip(mixtures[:, 0], CLUSTERS[windows], strict=True):
            assert (mixture[group] > 0).all()
            drawn += 1
            mixed += mixture.max() < 1
            expected += mixture
            seen += np.bincount(group, minlength=4) / 4
    assert 0.35 < mixed / drawn <= 0.5  # half are soups; one of three equal clusters is a plain expert again
    np.testing.assert_allclose(seen / drawn, expected / drawn, atol=0.02)
    np.testing.assert_allclose(seen / drawn, np.array(SIZES) / 400, atol=0.03)


@st.composite
def _soups(draw: st.DrawFn) -> tuple[list[int], int, int, float]:
    """Sizes of clusters, windows per group, groups per step, fraction of soups."""
    row = draw(st.integers(1, 4))
    sizes = draw(st.one_of(
        st.lists(st.integers(row, 60), min_size=1, max_size=12),
        st.tuples(st.integers(row, 20), st.sampled_from([2, 4, 8, 16])).map(lambda drawn: [drawn[0]] * drawn[1]),
    ))  # fmt: skip
    fraction = draw(st.one_of(st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.floats(0.01, 0.99)))
    return sizes, row, draw(st.sampled_from([1, 2, 3, 8])), fraction


@settings(max_examples=60, deadline=None)
@given(_soups(), st.integers(0, 5), st.integers(0, 10_000))
def test_plain_groups_keep_the_bound_and_the_order_beside_soups(
    case: tuple[list[int], int, int, float], seed: int, far: int
) -> None:
    sizes, row, groups, fraction = case
    soup = Soup(fraction=fraction, clusters=2)
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    index = cluster_index(clusters, k=len(sizes))
    stream, other = (
        ExpertStream(index, global_batch_size=row * groups, windows_per_expert=row, soup=soup, seed=seed)
        for _ in range(2)
    )
    np.testing.assert_array_equal(stream.draw(far).window_ids, other.draw(far).window_ids)  # reached directly
    counts, drawn, due = np.zeros(len(sizes)), np.zeros(sum(sizes)), np.array(sizes) / sum(sizes)
    for step in range(25):
        windows = stream.draw(step).window_ids.reshape(groups, row)
        mixtures = _mixtures(stream, step).reshape(groups, row, -1)
        for group, number in enumerate(range(step * groups, (step + 1) * groups)):
            if soups_before(number + 1, soup) > soups_before(number, soup):
                continue
            (cluster,) = set(clusters[windows[group]])
            assert mixtures[group].argmax(1).tolist() == [cluster] * row
            counts[cluster] += 1
            np.add.at(drawn, windows[group], 1)
            assert (np.abs(counts - counts.sum() * due) < 2).all()
    plain = 25 * groups - soups_before(25 * groups, soup)
    assert counts.sum() == plain and abs(plain - 25 * groups * (1 - fraction)) <= 1
    for cluster in range(len(sizes)):
        own = drawn[clusters == cluster]
        assert own.max() - own.min() <= 1, "every window once before any comes again"


@pytest.mark.parametrize("k", [2, 4, 16])
def test_with_half_soups_every_expert_has_its_plain_groups(k: int) -> None:
    index = cluster_index(np.repeat(np.arange(k), 50), k=k)
    soup = Soup(fraction=0.5, clusters=2)
    stream = ExpertStream(index, global_batch_size=16, windows_per_expert=2, soup=soup, seed=0)
    steps = 8 * k
    groups = np.concatenate([_mixtures(stream, step)[::2] for step in range(steps)])
    plain = [groups[n] for n in range(len(groups)) if soups_before(n + 1, soup) == soups_before(n, soup)]
    assert np.sum(plain, axis=0).tolist() == [32] * k


def test_the_report_is_of_what_is_read() -> None:
    stream, steps = _stream(Soup(fraction=0.5, clusters=3)), 200
    read = np.concatenate([stream.draw(step).window_ids for step in range(steps)])
    report = stream.report(steps)
    assert report.windows_drawn == len(read) and report.effective_sample_size == pytest.approx(400)
    repeats = np.bincount(CLUSTERS[read]) / SIZES
    np.testing.assert_allclose(report.expected_repeats, repeats, rtol=0.15)


def test_a_step_is_a_pure_function_of_the_seed() -> None:
    soup = Soup(fraction=0.5, clusters=3)
    one, other = _stream(soup), _stream(soup)
    other.draw(3)
    for ours, theirs in zip(one.draw(9), other.draw(9), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(one.draw(9).window_ids, _stream(soup, seed=1).draw(9).window_ids)


def test_a_batch_of_broken_groups_is_refused() -> None:
    with pytest.raises(DataError, match="30: it must be a positive multiple of 4"):
        ExpertStream(INDEX, global_batch_size=30, windows_per_expert=4, soup=None, seed=0)


def test_budgets_of_experts() -> None:
    sizes = np.array([10, 30, 0, 60])
    assert [expert_steps(100, budget="equal", size=size, sizes=sizes) for size in sizes] == [100] * 4
    proportional = [expert_steps(100, budget="proportional", size=size, sizes=sizes) for size in (10, 30, 60)]
    assert proportional == [30, 90, 180]
    check_enough(3, windows=8, needed=8, field="global_batch_size", otherwise="")
    with pytest.raises(
        DataError, match=r"cluster 3 has 7 generic windows, too few for an expert: fewer than mix.x 8; low"
    ):
        check_enough(3, windows=7, needed=8, field="mix.x", otherwise="use fewer clusters")


# --- two stores as one --------------------------------------------------------------------------------------------------


def _store(folder: Path, first: int, *, context_length: int = 4, tokens: int = 6) -> TokenStore:
    """Two documents, of `tokens` tokens each."""
    folder.mkdir()
    writer = StoreWriter(folder, "train", context_length=context_length, vocabulary_size=100)
    for start in (first, first + tokens):
        writer.add_document(np.arange(start, start + tokens) % 100)
    describe_store(
        folder,
        splits={"train": writer.finish()},
        tokenizer="t",
        context_length=context_length,
        vocabulary_size=100,
        eod=0,
    )
    return TokenStore.open(folder, "train")


def test_joined_stores_give_each_window_as_its_own_store_does(tmp_path: Path) -> None:
    first, second = _store(tmp_path / "a", 1), _store(tmp_path / "b", 50)
    joined = JoinedStore(first, second)
    assert len(joined) == 8
    ids = np.array([5, 0, 7, 3, 4, 1])
    batch = joined.batch(ids)
    for row, window in enumerate(ids):
        alone = (first if window < 4 else second).batch(np.array([window % 4]))
        for field in ("tokens", "targets", "mask"):
            np.testing.assert_array_equal(getattr(batch, field)[row], getattr(alone, field)[0])
    np.testing.assert_array_equal(joined.batch(np.array([2])).targets, first.batch(np.array([2])).targets)


def test_windows_of_two_lengths_are_not_joined(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="windows of 4 tokens"):
        JoinedStore(_store(tmp_path / "a", 1), _store(tmp_path / "b", 1, context_length=3))


def test_a_second_set_is_one_more_cluster_with_its_fraction() -> None:
    """Replay and specialized pretraining: the share is kept within the stream's two windows, and clusters keep theirs."""
    joined = INDEX.joined(ClusterIndex.single(10))
    stream = ImportanceStream(joined, np.append(0.8 * np.array(SIZES) / 400, 0.2), global_batch_size=16, seed=0)
    windows = np.concatenate([stream.draw(step).window_ids for step in range(50)])
    assert abs((windows >= 400).sum() - 0.2 * 800) <= 2
    own = windows[windows < 400]
    np.testing.assert_allclose(np.bincount(CLUSTERS[own]) / len(own), np.array(SIZES) / 400, atol=3 / len(own))
    plain = ClusterIndex.single(5).joined(ClusterIndex.single(3))
    assert plain.order is None and list(plain.sizes) == [5, 3]
