"""Packing of windows into micro-batches: what is computed stays, only the padding goes."""

from itertools import chain, product

import numpy as np
import pytest

from megatron_specialm.data.packing import MicroBatches, packed, plan_sequences, window_lengths
from megatron_specialm.data.store import MIXTURE, Batch

CONTEXT, NOTES = 16, "notes"


def _batch(rows: int = 24, *, seed: int = 0, experts: int | None = None) -> Batch:
    generator = np.random.default_rng(seed)
    windows = generator.integers(1, 1000, (rows, CONTEXT + 1))
    lengths = generator.integers(1, CONTEXT + 1, rows)
    mask = (np.arange(CONTEXT) < lengths[:, None]).astype(np.float32)
    extra_inputs = {NOTES: generator.random((rows, CONTEXT, 3), np.float32)}
    if experts is not None:
        extra_inputs[MIXTURE] = np.eye(experts, dtype=np.float32)[generator.integers(0, experts, rows)]
    return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), mask, extra_inputs)


def _windows(batch: Batch) -> list[tuple]:
    """The windows that count: tokens, targets, weights, further inputs and mixture."""
    mixtures = batch.extra_inputs.get(MIXTURE)
    if batch.lengths is None:
        places = [(row, 0, length) for row, length in enumerate(window_lengths(batch).tolist())]
    else:
        ends = np.cumsum(batch.lengths).tolist()
        places = [(0, end - length, end) for end, length in zip(ends, batch.lengths, strict=True)]
    found = []
    for number, (row, start, end) in enumerate(places):
        if batch.mask[row, start:end].any():
            parts = (batch.tokens, batch.targets, batch.mask, batch.extra_inputs[NOTES])
            mixture = () if mixtures is None else tuple(mixtures[number])
            found.append((*(part[row, start:end].tobytes() for part in parts), mixture))
    return found


@pytest.mark.parametrize("packing", ["none", "sorted", "packed"])
@pytest.mark.parametrize("experts", [None, 3])
@pytest.mark.parametrize(
    ("multiple", "stages", "interleaved"), [(1, 1, False), (4, 1, False), (1, 2, True), (4, 4, False)]
)
def test_every_window_is_there_once_as_it_was(
    packing: str, experts: int | None, multiple: int, stages: int, interleaved: bool
) -> None:
    batches = [_batch(experts=experts), _batch(5, seed=1, experts=experts)]
    cut = MicroBatches(
        packing,
        4,
        multiple=multiple,
        stages=stages,
        interleaved=interleaved,
        by_expert=experts is not None and packing != "none",
    )
    found = cut.of(batches)
    assert sorted(chain(*map(_windows, found))) == sorted(chain(*map(_windows, batches)))
    for part in found:
        assert part.tokens.size <= 4 * CONTEXT and part.tokens.shape[1] % multiple == 0
        assert part.lengths is None or (sum(part.lengths) == part.tokens.shape[1] and max(part.lengths) <= CONTEXT)
        assert not cut.by_expert or len({window[-1] for window in _windows(part)}) <= 1
    if packing == "packed":
        assert len(found) % (stages if interleaved else 1) == 0 and len(found) >= stages
        assert stages == 1 or len({part.tokens.shape for part in found}) == 1


def test_none_is_the_batch_in_its_order_filled_up() -> None:
    batch = _batch(6)
    first, last = MicroBatches("none", 4).of([batch])
    np.testing.assert_array_equal(np.concatenate([first.tokens, last.tokens])[:6], batch.tokens)
    assert last.tokens.shape == (4, CONTEXT) and not last.mask[2:].any()


def test_packed_sequences_are_few_and_of_like_size() -> None:
    lengths = np.random.default_rng(0).integers(1, 1025, 512)
    plan = plan_sequences(lengths, 8 * 1024)
    tokens = [int(lengths[windows].sum()) for windows in plan]
    assert len(plan) == -(-int(lengths.sum()) // (8 * 1024)) and max(tokens) - min(tokens) < 80
    assert all(np.array_equal(a, b) for a, b in zip(plan, plan_sequences(lengths, 8 * 1024), strict=True))


@pytest.mark.parametrize(
    ("lengths", "count"), [([16] * 9, 3), ([9, 9, 9, 9, 9, 9], 2), ([], 1), ([0, 0], 1), ([48], 1)]
)
def test_a_sequence_holds_at_most_its_capacity(lengths: list[int], count: int) -> None:
    plan = plan_sequences(np.array(lengths, np.int64), 48)
    assert len(plan) == count
    assert sorted(chain(*plan)) == list(range(len(lengths)))
    assert len(plan_sequences(np.array(lengths, np.int64), 48, 4)) == 4
    assert len(plan_sequences(np.array(lengths, np.int64), 48, 4, 3)) == 6


@pytest.mark.parametrize(("interleaved", "count"), [(False, 5), (True, 8)])
def test_only_interleaved_pipelines_round_the_number_of_micro_batches_up(interleaved: bool, count: int) -> None:
    batch = _batch(20)._replace(mask=np.ones((20, CONTEXT), np.float32))
    assert len(MicroBatches("packed", 4, stages=4, interleaved=interleaved).of([batch])) == count


def test_windows_that_do_not_fit_evenly_take_one_more_sequence() -> None:
    plan = plan_sequences(np.array([5, 5, 5]), 8)  # 15 tokens would fit into two
    assert [windows.tolist() for windows in plan] == [[0], [1], [2]]


@pytest.mark.parametrize(("packing", "fill"), [("sorted", 0.85), ("packed", 1.0)])
def test_little_padding_is_left(packing: str, fill: float) -> None:
    batch = _batch(64)
    found = MicroBatches(packing, 4).of([batch])
    slots = sum(part.tokens.size for part in found)
    assert batch.mask.sum() / slots >= fill > batch.mask.mean()


def test_padding_at_the_end_is_windows_of_its_own() -> None:
    batch = _batch(2)
    tokens = int(batch.mask.sum())
    row = packed(batch, positions=tokens + 20)
    assert row.lengths == (*window_lengths(batch), CONTEXT, 20 - CONTEXT)
    assert row.tokens.shape == (1, tokens + 20) and not row.mask[0, tokens:].any()


def test_windows_without_a_token_that_counts_are_left_out() -> None:
    batch = _batch(4, experts=3)
    batch.mask[2] = 0
    (part,) = MicroBatches("packed", 4).of([batch])
    assert part.lengths == tuple(window_lengths(batch)[[0, 1, 3]])
    np.testing.assert_array_equal(part.extra_inputs[MIXTURE], batch.extra_inputs[MIXTURE][[0, 1, 3]])


def test_a_sequence_that_fills_up_has_a_mixture_of_the_batch() -> None:
    batch = _batch(2, experts=3)
    first, second = MicroBatches("packed", 4, stages=2, by_expert=True).of([batch.rows(slice(0, 1))])
    assert not second.mask.any() and (second.extra_inputs[MIXTURE] == batch.extra_inputs[MIXTURE][0]).all()
    assert first.tokens.shape == second.tokens.shape


@pytest.mark.parametrize("packing", ["sorted", "packed"])
def test_batches_without_a_token_still_make_a_pass(packing: str) -> None:
    empty = _batch(3)._replace(mask=np.zeros((3, CONTEXT), np.float32))
    (part,) = MicroBatches(packing, 4, multiple=2).of([empty, empty])
    assert part.tokens.shape[1] == 2 and not part.mask.any()


def test_copies_make_equally_many_passes_of_one_size() -> None:
    few, many = _batch(4), _batch(40)
    cut = MicroBatches("packed", 4)
    agreed: list[tuple[int, int]] = []

    def note(*own: int) -> tuple[int, int]:
        agreed.append(own)
        return own

    for batch in (few, many):
        cut.of([batch], note)
    most = (max(count for count, _ in agreed), max(positions for _, positions in agreed))
    shapes = [[part.tokens.shape for part in cut.of([batch], lambda *_: most)] for batch in (few, many)]
    assert shapes[0] == shapes[1] == [(1, most[1])] * most[0]


@pytest.mark.parametrize("windows_per_expert", [1, 4])
@pytest.mark.parametrize(("stages", "interleaved", "jointly"), [(2, False, False), (4, True, False), (1, False, True)])
def test_in_one_shape_a_mixture_of_many_tokens_pads_the_others_little(
    windows_per_expert: int, stages: int, interleaved: bool, jointly: bool
) -> None:
    """32 mixtures, the first of which has a fourth of the windows: micro-batches of 8 windows would be padded to 85%."""
    batch, generator = _batch(128), np.random.default_rng(0)
    frequencies = 1 / np.arange(1, 33)
    drawn = generator.choice(32, 128 // windows_per_expert, p=frequencies / frequencies.sum())
    mixtures = np.eye(32, dtype=np.float32)[np.repeat(drawn, windows_per_expert)]
    batch = batch._replace(extra_inputs=batch.extra_inputs | {MIXTURE: mixtures})
    cut = MicroBatches("packed", 8, stages=stages, interleaved=interleaved, by_expert=True)
    found = cut.of([batch], (lambda *own: own) if jointly else None)
    assert len({part.tokens.shape for part in found}) == 1 and len(found) % (stages if interleaved else 1) == 0
    assert sorted(chain(*map(_windows, found))) == sorted(_windows(batch))
    assert batch.mask.sum() / sum(part.tokens.size for part in found) > max(0.6, batch.mask.mean())


def test_copies_choose_one_size_of_micro_batches() -> None:
    """Whichever has the less padding for all: by the largest numbers and lengths, not by their own."""
    batches = [_batch(24, seed=seed, experts=4) for seed in (0, 1)]
    cut, asked = MicroBatches("packed", 8, by_expert=True), []
    for batch in batches:
        cut.of([batch], lambda *own: asked.append(own) or own)
    most = tuple(map(max, *asked))
    shapes = [[part.tokens.shape for part in cut.of([batch], lambda *_: most)] for batch in batches]
    assert shapes[0] == shapes[1]


def test_the_length_of_a_window_ends_with_the_last_token_that_counts() -> None:
    mask = np.array([[1, 0, 2, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    tokens = np.zeros((3, 4), np.int64)
    assert window_lengths(Batch(tokens, tokens, mask)).tolist() == [3, 0, 4]


def test_planning_is_a_function_of_the_lengths_alone() -> None:
    for seed, packing in product(range(3), ("sorted", "packed")):
        first, again = (MicroBatches(packing, 4).of([_batch(seed=seed)]) for _ in range(2))
        assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
