"""Micro-batches of windows of uneven length, with little padding or none.

| packing | a micro-batch                                                    | its tokens                                |
|---------|------------------------------------------------------------------|-------------------------------------------|
| none    | `size` windows in their order                                    | (size, T)                                 |
| sorted  | `size` windows of like length                                    | (size, length of its longest window)      |
| packed  | windows of at most `size` * T tokens in all, behind each other   | (1, sum of their lengths)                 |

A packed sequence lists the lengths of its windows (`Batch.lengths`); the model confines attention to each of them and counts
positions from 0 in each. All three are pure functions of the batch. They hold the same windows, so sums over tokens, such as
losses and gradients, are equal up to rounding.

Legend: B windows of a batch, T context length, K clusters.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_specialm.config.packing import Packing
from megatron_specialm.data.store import MIXTURE, Batch

Largest = Callable[..., Sequence[int]]


@dataclass(frozen=True)
class MicroBatches:
    """Cuts batches into micro-batches.

    Attributes:
        size: windows of a micro-batch; of a packed one it sets the largest number of tokens, size * T.
        multiple: of the positions of a micro-batch, as sequence parallelism and FP8 need.
        stages: pipeline stages: with more than one, there is a packed micro-batch for each at least, and all have one length,
            which may be that of fewer windows than `size` where mixtures have unequal numbers of tokens.
        interleaved: whether the number of packed micro-batches must be a multiple of the stages.
        by_expert: whether all windows of a micro-batch must have one mixture of experts.
    """

    packing: Packing
    size: int
    multiple: int = 1
    stages: int = 1
    interleaved: bool = False
    by_expert: bool = False

    def of(self, batches: Sequence[Batch], largest: Largest | None = None) -> list[Batch]:
        """The micro-batches of some batches, one or more.

        Args:
            largest: of each value the largest that a copy has, where all copies make equally many passes of equal size.
        """
        if self.packing == "none":
            return [part for batch in batches for part in _in_order(batch, self.size)]
        whole = _joined([batch for batch in batches if batch.mask.any()] or batches[:1])
        groups = _by_mixture(whole) if self.by_expert else [whole]
        if self.packing == "sorted":
            return [part for group in groups for part in self._sorted(group)]
        return self._packed(whole, groups, largest)

    def _sorted(self, batch: Batch) -> Iterable[Batch]:
        longest_first = batch.rows(np.argsort(-window_lengths(batch), kind="stable"))
        for part in _in_order(longest_first, self.size):
            yield part.positions(self._up(int(window_lengths(part).max())))

    def _packed(self, whole: Batch, groups: Sequence[Batch], largest: Largest | None) -> list[Batch]:
        context, one_shape = whole.tokens.shape[1], self.stages > 1 or largest is not None
        # The mixture with most tokens pads all others' micro-batches: with smaller ones there may be less padding.
        sizes = _halved(self.size) if one_shape and self.by_expert else [self.size]
        plans = [self._plan(groups, size * context) for size in sizes]
        plan, positions = plans[0]
        if one_shape:
            own = [value for plan, positions in plans for value in (self._count(plan), max(positions))]
            shapes = np.array(own if largest is None else largest(*own), np.int64).reshape(-1, 2)
            best = int(shapes.prod(axis=1).argmin())
            count, longest = shapes[best].tolist()
            plan, positions = plans[best][0], [longest] * count
            plan = plan + [(whole.rows(slice(0, 1)), np.empty(0, np.int64))] * (count - len(plan))
        return [packed(group, rows, to) for (group, rows), to in zip(plan, positions, strict=True)]

    def _plan(self, groups: Sequence[Batch], capacity: int) -> tuple[list[tuple[Batch, np.ndarray]], list[int]]:
        """The windows of each micro-batch, and how many positions they take."""
        counts = (self.stages, self.stages if self.interleaved else 1) if len(groups) == 1 else (1, 1)
        plan = [(group, rows) for group in groups for rows in plan_sequences(window_lengths(group), capacity, *counts)]
        return plan, [self._up(int(window_lengths(group)[rows].sum())) for group, rows in plan]

    def _count(self, plan: Sequence[object]) -> int:
        """How many micro-batches a pipeline needs for a plan."""
        count = max(len(plan), self.stages)
        return count + -count % (self.stages if self.interleaved else 1)

    def _up(self, positions: int) -> int:
        return max(1, -(-positions // self.multiple)) * self.multiple


def _halved(size: int) -> list[int]:
    """A number of windows, half of it, and so on down to 1."""
    return [size] if size == 1 else [size, *_halved(size // 2)]


def window_lengths(batch: Batch) -> np.ndarray:
    """The number of tokens of each window up to the last one that counts, (B,) int64."""
    counts = batch.mask != 0
    return np.where(counts.any(1), counts.shape[1] - counts[:, ::-1].argmax(1), 0)


def plan_sequences(lengths: np.ndarray, capacity: int, at_least: int = 1, multiple: int = 1) -> list[np.ndarray]:
    """Which windows, by their places in `lengths`, share a sequence. There are as few sequences as fit, of like size. Windows
    are placed longest first, each into the sequence with fewest tokens. O(B log B).

    Args:
        capacity: the most tokens of a sequence; no window has more.
        at_least: of sequences; some are empty where there are fewer windows.
        multiple: of the number of sequences.
    """
    assert lengths.max(initial=0) <= capacity
    count = max(at_least, -(-int(lengths.sum()) // capacity))
    while True:
        count += -count % multiple
        sequences: list[list[int]] = [[] for _ in range(count)]
        tokens = [(0, number) for number in range(count)]
        for window in np.argsort(-lengths, kind="stable").tolist():
            filled, number = tokens[0]
            sequences[number].append(window)
            heapq.heapreplace(tokens, (filled + int(lengths[window]), number))
        if max(tokens)[0] <= capacity:
            return [np.array(sorted(sequence), np.int64) for sequence in sequences]
        count += 1


def packed(batch: Batch, rows: np.ndarray | None = None, positions: int | None = None) -> Batch:
    """Windows of a batch behind each other in one sequence. Those without a token that counts are left out.

    Args:
        rows: which of the windows; None for all.
        positions: of the sequence, padding at its end included; None for no padding. Padding counts as further windows, none
            of them longer than T, with the mixture of the batch's first one.
    """
    part = batch if rows is None else batch.rows(rows)
    part = part.rows(window_lengths(part) > 0)
    context, lengths = batch.tokens.shape[1], window_lengths(part)
    here = np.arange(context) < lengths[:, None]
    padding = 0 if positions is None else positions - int(lengths.sum())
    pieces = [min(context, padding - start) for start in range(0, padding, context)]

    def flat(values: np.ndarray) -> np.ndarray:
        return np.pad(values[here], ((0, padding), *[(0, 0)] * (values.ndim - 2)))[None]

    extra_inputs = {name: flat(values) for name, values in part.extra_inputs.items() if name != MIXTURE}
    if MIXTURE in part.extra_inputs:
        of_padding = np.repeat(batch.extra_inputs[MIXTURE][:1], len(pieces), axis=0)
        extra_inputs[MIXTURE] = np.concatenate([part.extra_inputs[MIXTURE], of_padding])
    return Batch(flat(part.tokens), flat(part.targets), flat(part.mask), extra_inputs, (*lengths.tolist(), *pieces))


def _in_order(batch: Batch, size: int) -> Iterable[Batch]:
    """`size` windows at a time. The last batch of a set may be short: windows that do not count fill it up."""
    batch = batch.padded(-len(batch.tokens) % size)
    for start in range(0, len(batch.tokens), size):
        yield batch.rows(slice(start, start + size))


def _joined(batches: Sequence[Batch]) -> Batch:
    first = batches[0]
    extra_inputs = {
        name: np.concatenate([batch.extra_inputs[name] for batch in batches]) for name in first.extra_inputs
    }
    tokens, targets, mask = (
        np.concatenate([getattr(batch, field) for batch in batches]) for field in ("tokens", "targets", "mask")
    )
    return Batch(tokens, targets, mask, extra_inputs)


def _by_mixture(batch: Batch) -> list[Batch]:
    _, groups = np.unique(batch.extra_inputs[MIXTURE], axis=0, return_inverse=True)
    return [batch.rows(np.flatnonzero(groups.ravel() == group)) for group in range(groups.max() + 1)]
