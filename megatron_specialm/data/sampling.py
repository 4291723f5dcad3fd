"""The importance stream: which window is read when, as a pure function of (seed, step, cluster weights).

The paper trains on generic text drawn so that its clusters appear as often as in the specialization set: w(x) =
P(c(x) | specialization) / P(c(x) | generic) (Grangier et al., arXiv 2402.01093, section 3). Drawing a cluster by its
target frequency and then a window of it, each as often as the next, is the same thing and needs no weight per window.

Draw number t of the stream (step s of batch size B holds the draws sB ... sB + B - 1) is found in three steps:

1. Cluster: `_Schedule` says which cluster draw t goes to and how many draws that cluster had before: its rank.
2. Order: rank // size is the epoch, rank % size the place in it; a keyed bijection of [0, size) turns the place into a
   member of the cluster. Every window is used once before any is used again, and then the order is another one.
3. Window: `ClusterIndex` turns (cluster, member) into a window id.

Nothing is remembered from draw to draw, so there is no state to save, any step can be asked for at the same price, and
ranks and micro-batches are slices of a batch that knows of neither.

Shapes: N windows, K clusters, B = global batch size.
"""

import bisect
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_specialm.base.errors import DataError

# Up to four passes over the same text are worth nearly as much as new text, more are not (arXiv 2305.16264).
MAX_USEFUL_REPEATS = 4.0
_MAX_WARNINGS = 10
_ROUNDS = 4
_GOLDEN = 0x9E3779B97F4A7C15


def histogram(clusters: np.ndarray, *, k: int) -> np.ndarray:
    """Frequencies (K,) float64, summing to 1, of cluster ids (N,).

    Raises:
        DataError: no ids, or an id outside [0, k).
    """
    return _count(clusters, k) / len(clusters)


def importance_weights(target: np.ndarray, generic_sizes: np.ndarray) -> tuple[np.ndarray, float]:
    """How often to draw from each generic cluster, so that the draws look like the target.

    Args:
        target: (K,) histogram of the specialization set, as counts or frequencies.
        generic_sizes: (K,) generic windows per cluster.

    Returns:
        (K,) weights summing to 1: the target on the clusters that have generic windows. And the fraction of the target
        that is lost because its clusters have none.

    Raises:
        DataError: lengths differ, a target is negative or not finite, or all of it is lost.
    """
    sizes = np.asarray(generic_sizes)
    target = _frequencies(target, k=len(sizes), name="target histogram")
    kept = np.where(sizes > 0, target, 0.0)
    if not kept.any():
        raise DataError(
            f"none of the target's {np.count_nonzero(target)} clusters has a generic window: "
            "use fewer clusters or more generic text"
        )
    return kept / math.fsum(kept), math.fsum(target[sizes <= 0])


@dataclass(frozen=True, eq=False)
class ClusterIndex:
    """Which windows each cluster holds: cluster c has the windows order[offsets[c]:offsets[c + 1]].

    order: (N,) window ids sorted by cluster, of any integer type, perhaps a memory map; None for the identity.
    offsets: (K + 1,) int64, from 0 to N.
    """

    order: np.ndarray | None
    offsets: np.ndarray

    def __post_init__(self) -> None:
        n = self.offsets[-1] if self.order is None else len(self.order)
        if len(self.offsets) < 2 or self.offsets[0] != 0 or self.offsets[-1] != n or (np.diff(self.offsets) < 0).any():
            raise DataError(
                f"offsets must rise from 0 to the {n} windows of the order: they are not of one index, rebuild"
            )

    @classmethod
    def single(cls, windows: int) -> "ClusterIndex":
        """All windows in one cluster: plain pretraining."""
        return cls(order=None, offsets=np.array([0, windows], dtype=np.int64))

    @classmethod
    def from_assignment(cls, clusters: np.ndarray, *, k: int) -> "ClusterIndex":
        """Index cluster ids (N,) of the windows 0 ... N - 1. Takes about 14 bytes per window while it sorts.

        Raises:
            DataError: no ids, or an id outside [0, k).
        """
        sizes = _count(clusters, k)
        narrow = np.asarray(clusters).astype(np.uint16 if k <= 1 << 16 else np.int64)  # 16 bits: a radix sort
        order = np.argsort(narrow, kind="stable").astype(np.int32 if len(narrow) < 1 << 31 else np.int64)
        return cls(order=order, offsets=np.cumsum([0, *sizes], dtype=np.int64))

    @property
    def sizes(self) -> np.ndarray:
        """Windows per cluster, (K,) int64."""
        return np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class StreamReport:
    """What a run will read, known before it starts.

    effective_sample_size: in windows, 1 / sum_x p(x)^2 = 1 / sum_c(w_c^2 / n_c) (Kish). It is N when every window is as
        likely as the next, and falls as the weight gathers on small clusters.
    windows_drawn: steps times batch size.
    expected_repeats: (K,) how often each window of the cluster is read; 0 for clusters that are not drawn.
    max_repeats: the largest of them.
    warnings: a sentence for each cluster above MAX_USEFUL_REPEATS, most repeated first; the tail in one.
    """

    effective_sample_size: float
    windows_drawn: int
    expected_repeats: np.ndarray
    max_repeats: float
    warnings: tuple[str, ...]


class _Schedule:
    """The clusters of the draws 0, 1, 2, ... under fixed weights, with any draw reached directly.

    A binary tree whose leaves are the clusters of positive weight. Of the first m draws that a node receives, its
    lighter child, of share p <= 1/2, gets L(m) = floor(m p + 1/2) and the heavier child the rest. L grows by 0 or 1 per
    draw; so draw i goes to the light child exactly if L(i + 1) > L(i), as its draw number L(i), and else to the heavy
    child as its draw number i - L(i). Descending from the root finds the leaf, after log2(K) + 1 nodes or fewer in the
    mean: it is Huffman's code.

    No cluster is ever two windows away from weight times draws. Let W be a node's weight, n the draws of the root, m
    those of the node and d = n W - m its error. The light child's error is n p W - L(m) = p d + (p m - L(m)), the heavy
    child's (1 - p) d - (p m - L(m)), and L(m) is within 1/2 of p m: a child's error is at most its share of its
    parent's, plus 1/2. The root has none. With s the share of a leaf, s' of its parent, s'' of the parent's parent,

        |d| <= 1/2 (1 + s + s s' + s s' s'' + ...).

    In a Huffman tree an inner node v has at most 2/3 of its parent: when v's children a <= b were joined they were the
    two lightest, so v's sibling u, or each piece it was later made of, weighed at least b >= v/2, and v / (v + u) <=
    v / (v + v/2) = 2/3. Hence s <= 1 and s', s'', ... <= 2/3, and |d| < 1/2 (1 + 1 + 2/3 + 4/9 + ...) = 2.
    """

    def __init__(self, weights: np.ndarray) -> None:
        """Build the tree of (K,) weights that sum to 1. O(K log K)."""
        self._k = len(weights)
        # Inner nodes are numbered from 0 as they are made, so children come before parents; cluster c's leaf is ~c < 0.
        heap = [(float(weights[c]), order, ~int(c)) for order, c in enumerate(np.flatnonzero(weights))]
        light, heavy, share = [], [], []
        for node in range(len(heap) - 1):
            weight_a, _, a = heapq.heappop(heap)
            weight_b, _, b = heap[0]
            light.append(a)
            heavy.append(b)
            share.append(weight_a / (weight_a + weight_b))
            heapq.heapreplace(heap, (weight_a + weight_b, self._k + node, node))
        self._root = heap[0][2]
        self._light = np.array(light, dtype=np.int64)
        self._heavy = np.array(heavy, dtype=np.int64)
        self._light_share = np.array(share, dtype=np.float64)

    def locate(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cluster of each draw, (B,) int64, and how many earlier draws that cluster had, (B,) int64."""
        rank = draws.astype(np.float64)  # exact up to 2^53
        node = np.full(len(draws), self._root)
        descending = np.flatnonzero(node >= 0)
        while descending.size:
            i, v = rank[descending], node[descending]
            share = self._light_share[v]
            before = np.floor(i * share + 0.5)
            to_light = np.floor((i + 1) * share + 0.5) > before
            child = np.where(to_light, self._light[v], self._heavy[v])
            rank[descending] = np.where(to_light, before, i - before)
            node[descending] = child
            descending = descending[child >= 0]
        return ~node, rank.astype(np.int64)

    def counts(self, draws: int) -> np.ndarray:
        """How many of the first `draws` draws each cluster gets, (K,) int64. One pass from the root, O(K)."""
        counts = np.zeros(self._k, dtype=np.int64)
        received = [0] * len(self._light) + [draws]  # the last inner node is the root; a lone leaf has none
        if self._root < 0:
            counts[~self._root] = draws
        for node in range(len(self._light) - 1, -1, -1):
            drawn = draws if node == self._root else received[node]
            to_light = math.floor(drawn * float(self._light_share[node]) + 0.5)
            for child, part in ((int(self._light[node]), to_light), (int(self._heavy[node]), drawn - to_light)):
                if child < 0:
                    counts[~child] = part
                else:
                    received[child] = part
        return counts


class _Phase(NamedTuple):
    start: int  # first step
    weights: np.ndarray  # (K,) summing to 1
    schedule: _Schedule
    consumed: np.ndarray  # (K,) windows of each cluster drawn before `start`


class ImportanceStream:
    """Window ids of every optimizer step.

    Weights may change at given steps: `weights` is then [(first step, weights), ...], the first at step 0. Each phase
    has its own schedule, and each cluster goes on in its own order from where it stood. The bound of two windows holds
    within each phase, so over a run it is two windows per change of weights and two more.
    """

    def __init__(
        self,
        index: ClusterIndex,
        weights: np.ndarray | Sequence[tuple[int, np.ndarray]],
        *,
        global_batch_size: int,
        seed: int,
    ) -> None:
        """Build the schedules, O(K log K) per phase. Weights are (K,), non-negative, of any positive sum.

        Raises:
            DataError: weights that do not fit the index, phases out of order, or no windows per step.
        """
        if global_batch_size < 1:
            raise DataError(f"global_batch_size is {global_batch_size}: it must be at least 1")
        self._batch = global_batch_size
        self._order = (
            None if index.order is None else np.asarray(index.order)
        )  # a memory map stays one, as a plain view
        self._offsets, self._sizes = np.asarray(index.offsets), index.sizes
        self._keys = _mix(_mix(np.array([int(seed) % 2**64], np.uint64)) + np.arange(len(self._sizes), dtype=np.uint64))
        self._phases: list[_Phase] = []
        for start, raw in _phases(weights):
            values = self._fitting(raw)
            if not self._phases:
                self._phases.append(_Phase(start, values, _Schedule(values), np.zeros_like(self._sizes)))
            elif not np.array_equal(values, self._phases[-1].weights):  # saying the same again changes nothing
                self._phases.append(_Phase(start, values, _Schedule(values), self.counts(start)))

    def global_batch(self, step: int) -> np.ndarray:
        """Window ids of optimizer step `step` (from 0), (B,) int64; the price is the same for any step.

        Raises:
            DataError: step < 0.
        """
        clusters, ranks = self._draw(step)
        sizes = self._sizes[clusters]
        epochs, places = np.divmod(ranks, sizes)
        keys = _mix(self._keys[clusters] + epochs.astype(np.uint64))
        positions = self._offsets[clusters] + shuffled(places, sizes=sizes, keys=keys)
        return positions if self._order is None else self._order[positions].astype(np.int64)

    def clusters(self, step: int) -> np.ndarray:
        """The cluster of each window of `global_batch(step)`, (B,) int64, in the same order.

        Raises:
            DataError: step < 0.
        """
        return self._draw(step)[0]

    def counts(self, steps: int) -> np.ndarray:
        """How many windows of each cluster the first `steps` steps draw, (K,) int64. O(K).

        Raises:
            DataError: steps < 0.
        """
        phase = self._phase(steps)
        return phase.consumed + phase.schedule.counts((steps - phase.start) * self._batch)

    def report(self, steps: int) -> StreamReport:
        """What a run of `steps` optimizer steps will read; phases weigh by the steps each has of them.

        Raises:
            DataError: steps < 1.
        """
        if steps < 1:
            raise DataError(f"a report over {steps} steps has nothing to say: give at least 1")
        bounds = [min(phase.start, steps) for phase in self._phases] + [steps]
        spans = [end - start for start, end in itertools.pairwise(bounds)]
        weights = sum(span / steps * phase.weights for span, phase in zip(spans, self._phases, strict=True))
        per_window = weights / np.maximum(self._sizes, 1)
        repeats = steps * self._batch * per_window
        return StreamReport(
            effective_sample_size=1.0 / math.fsum(weights * per_window),
            windows_drawn=steps * self._batch,
            expected_repeats=repeats,
            max_repeats=float(repeats.max()),
            warnings=_repeat_warnings(repeats, self._sizes),
        )

    def _draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Cluster of each draw of a step, and how many windows the cluster had given before, both (B,) int64."""
        phase = self._phase(step)
        first = (step - phase.start) * self._batch
        clusters, ranks = phase.schedule.locate(np.arange(first, first + self._batch))
        return clusters, ranks + phase.consumed[clusters]

    def _phase(self, step: int) -> _Phase:
        if step < 0:
            raise DataError(f"step is {step}: steps count from 0")
        return self._phases[bisect.bisect_right(self._phases, step, key=lambda phase: phase.start) - 1]

    def _fitting(self, raw: np.ndarray) -> np.ndarray:
        """Weights (K,) over their sum, checked against the index."""
        values = _frequencies(raw, k=len(self._sizes), name="weights")
        empty = np.flatnonzero((values > 0) & (self._sizes == 0))
        if empty.size:
            raise DataError(
                f"cluster {empty[0]} has weight {values[empty[0]]:.3g} but no windows ({empty.size} such clusters): "
                "set their weights to 0, as importance_weights does"
            )
        return values


def shuffled(places: np.ndarray, *, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Member of a shuffled set at each place: for each key a bijection of [0, size), in constant memory.

    A Feistel network on numbers of two digits (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002,
    section 5): x = high * base + low with high < top and top * base only just above the size; each round adds a hash of
    one digit to the other. What lands outside the size walks on until it is inside, which is seldom needed.

    Args:
        places: (B,) int64, in [0, size).
        sizes: (B,) int64, at least 1.
        keys: (B,) uint64; equal keys and sizes name one order.

    Returns:
        (B,) int64, in [0, size).
    """
    limit, x = sizes.astype(np.uint64), places.astype(np.uint64)
    base = np.ceil(np.sqrt(sizes)).astype(np.uint64)
    top = (limit + base - np.uint64(1)) // base
    out: np.ndarray = np.empty_like(places)
    walking: np.ndarray = np.arange(len(places))
    while walking.size:
        x = _feistel(x, top=top, base=base, keys=keys)
        out[walking] = x  # not yet inside for some: the next pass overwrites those
        outside = x >= limit
        walking, x, limit, top, base, keys = (a[outside] for a in (walking, x, limit, top, base, keys))
    return out


def _feistel(x: np.ndarray, *, top: np.ndarray, base: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over [0, top * base); all arrays (B,) uint64."""
    high, low = np.divmod(x, base)
    for number in range(_ROUNDS):
        round_keys = keys + np.uint64((number + 1) * _GOLDEN % 2**64)
        if number % 2:
            low = (low + _mix(round_keys + high) % base) % base
        else:
            high = (high + _mix(round_keys + low) % top) % top
    return high * base + low


def _mix(z: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a hash of 64 bits to 64 bits, arithmetic mod 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _count(clusters: np.ndarray, k: int) -> np.ndarray:
    """Windows per cluster, (K,) int64, with the ids checked."""
    clusters = np.asarray(clusters)
    if clusters.size == 0:
        raise DataError("no cluster ids: the set has no windows")
    if clusters.ndim != 1 or clusters.dtype.kind not in "iu":
        raise DataError(f"cluster ids of shape {clusters.shape} and type {clusters.dtype}: they must be (N,) integers")
    low, high = int(clusters.min()), int(clusters.max())
    if low < 0 or high >= k:
        raise DataError(f"cluster ids from {low} to {high} do not fit {k} clusters: assign with the same centroids")
    return np.bincount(clusters, minlength=k)


def _frequencies(values: np.ndarray, *, k: int, name: str) -> np.ndarray:
    """Values (K,) over their sum, float64, to the same bits on every machine (fsum is exact).

    Raises:
        DataError: not K values, one is negative or not finite, or all are zero.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (k,):
        raise DataError(f"{name} of shape {values.shape} for {k} clusters: give one value per cluster")
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if wrong.size:
        raise DataError(f"{name}: cluster {wrong[0]} has {values[wrong[0]]}: give finite values that are not negative")
    if not values.any():
        raise DataError(f"{name}: all {k} values are zero: at least one must be positive")
    values = values / values.max()
    return values / math.fsum(values)


def _phases(weights: np.ndarray | Sequence[tuple[int, np.ndarray]]) -> Sequence[tuple[int, np.ndarray]]:
    """The weights as phases; plain weights are one phase from step 0."""
    if isinstance(weights, np.ndarray) or len(weights) == 0 or not isinstance(weights[0], tuple):
        return [(0, np.asarray(weights))]
    starts = [start for start, _ in weights]
    if starts[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        raise DataError(f"phases start at steps {starts}: the first must be 0 and each later than the one before")
    return weights


def _repeat_warnings(repeats: np.ndarray, sizes: np.ndarray) -> tuple[str, ...]:
    over = np.flatnonzero(repeats > MAX_USEFUL_REPEATS)
    over = over[np.argsort(-repeats[over], kind="stable")]
    sentences = [
        f"cluster {c}: its {sizes[c]:,} windows are read {repeats[c]:.1f} times each; more than {MAX_USEFUL_REPEATS:g} "
        "add little: take fewer steps, fewer clusters or more generic text"
        for c in over[:_MAX_WARNINGS]
    ]
    rest = len(over) - len(sentences)
    return (*sentences, *([f"{rest} more clusters are read more than {MAX_USEFUL_REPEATS:g} times"] if rest else []))
