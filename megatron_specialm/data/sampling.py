"""The importance stream: the windows of each step, as a pure function of (seed, step, cluster weights).

The paper trains on generic text whose clusters have the frequencies of the specialization set: w(x) = P(c(x) | specialization)
/ P(c(x) | generic) (Grangier et al., arXiv 2402.01093, section 3). Drawing a cluster by its target frequency, and then
uniformly a window of it, is equivalent and needs no weight per window.

Step s of batch size B has the draws sB ... sB + B - 1. Draw t is computed in three steps:

1. Cluster: `_Schedule` gives the cluster of draw t, and its rank: how many draws the cluster had before.
2. Order: rank // size is the epoch, rank % size the place in it. A keyed bijection of [0, size) maps the place to a member of
   the cluster. Every window is used once per epoch, and each epoch has another order.
3. Window: `ClusterIndex` maps (cluster, member) to a window id.

There is no state from draw to draw: nothing to save, every step takes the same time, and the batches of ranks and micro-batches
are slices of a global batch that does not depend on their number.

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
from megatron_specialm.data.clusters import ClusterIndex, frequencies
from megatron_specialm.data.permutation import mix, shuffled

# Up to four passes over the same text are worth nearly as much as new text, more are not (arXiv 2305.16264).
MAX_USEFUL_REPEATS = 4.0
_MAX_WARNINGS = 10


@dataclass(frozen=True, eq=False)
class StreamReport:
    """What a number of steps reads, computed without reading it.

    effective_sample_size: in windows, 1 / sum_x p(x)^2 = 1 / sum_c(w_c^2 / n_c) (Kish). It is N for uniform draws, and smaller
        where small clusters have large weights.
    windows_drawn: steps times batch size.
    expected_repeats: (K,) how often each window of the cluster is read; 0 for clusters that are not drawn.
    max_repeats: the largest of them.
    warnings: a sentence for each of the clusters above MAX_USEFUL_REPEATS, most repeated first, and one for the rest.
    """

    effective_sample_size: float
    windows_drawn: int
    expected_repeats: np.ndarray
    max_repeats: float
    warnings: tuple[str, ...]


class StepDraw(NamedTuple):
    """What one optimizer step reads, for B windows and K experts.

    window_ids: (B,) int64.
    mixtures: (B, K) float32, each row summing to 1: the weights of the experts that compute the window. One-hot for a single
        expert. None for a model without experts.
    """

    window_ids: np.ndarray
    mixtures: np.ndarray | None = None


class _Schedule:
    """The clusters of the draws 0, 1, 2, ... under fixed weights; any draw is computed directly.

    A binary tree whose leaves are the clusters of positive weight. Of the first m draws of a node, its lighter child, which has
    the fraction p <= 1/2 of its weight, gets L(m) = floor(m p + 1/2), and the heavier child the rest. L grows by 0 or 1 per
    draw. So draw i goes to the light child, as its draw L(i), exactly if L(i + 1) > L(i), and otherwise to the heavy child, as
    its draw i - L(i). The descent from the root to a leaf visits at most log2(K) + 1 nodes on average: the tree is a Huffman
    code.

    The draws of a cluster are always within two windows of weight times draws. Let W be a node's weight, n the draws of the
    root, m those of the node and d = n W - m its error. The light child's error is n p W - L(m) = p d + (p m - L(m)), the heavy
    child's (1 - p) d - (p m - L(m)), and L(m) is within 1/2 of p m: a child's error is at most its fraction of its
    parent's, plus 1/2. The root has none. With s the fraction of a leaf, s' of its parent, s'' of the parent's parent,

        |d| <= 1/2 (1 + s + s s' + s s' s'' + ...).

    In a Huffman tree an inner node v has at most 2/3 of its parent: when v's children a <= b were joined they were the
    two lightest, so v's sibling u, or each part that u was later made of, weighed at least b >= v/2, and v / (v + u) <=
    v / (v + v/2) = 2/3. Hence s <= 1 and s', s'', ... <= 2/3, and |d| < 1/2 (1 + 1 + 2/3 + 4/9 + ...) = 2.
    """

    def __init__(self, weights: np.ndarray) -> None:
        """Build the tree of (K,) weights that sum to 1. O(K log K)."""
        self._k = len(weights)
        # Inner nodes are numbered from 0 as they are made, so children precede parents. The leaf of cluster c is ~c < 0.
        heap = [(float(weights[c]), order, ~int(c)) for order, c in enumerate(np.flatnonzero(weights))]
        light, heavy, fraction = [], [], []
        for node in range(len(heap) - 1):
            weight_a, _, a = heapq.heappop(heap)
            weight_b, _, b = heap[0]
            light.append(a)
            heavy.append(b)
            fraction.append(weight_a / (weight_a + weight_b))
            heapq.heapreplace(heap, (weight_a + weight_b, self._k + node, node))
        self._root = heap[0][2]
        self._light = np.array(light, dtype=np.int64)
        self._heavy = np.array(heavy, dtype=np.int64)
        self._light_fraction = np.array(fraction, dtype=np.float64)

    def locate(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cluster of each draw, (B,) int64, and how many earlier draws that cluster had, (B,) int64."""
        rank = draws.astype(np.float64)  # exact up to 2^53
        node = np.full(len(draws), self._root)
        descending = np.flatnonzero(node >= 0)
        while descending.size:
            i, v = rank[descending], node[descending]
            fraction = self._light_fraction[v]
            before = np.floor(i * fraction + 0.5)
            to_light = np.floor((i + 1) * fraction + 0.5) > before
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
            to_light = math.floor(drawn * float(self._light_fraction[node]) + 0.5)
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
    has its own schedule; each cluster continues its own order. The bound of two windows holds within each phase, so the bound
    of a run is two windows for each change of weights, plus two.
    """

    def __init__(
        self,
        index: ClusterIndex,
        weights: np.ndarray | Sequence[tuple[int, np.ndarray]],
        *,
        global_batch_size: int,
        seed: int,
        windows_in_a_row: int = 1,
    ) -> None:
        """Build the schedules, O(K log K) per phase. Weights are (K,), non-negative, of any positive sum.

        Args:
            windows_in_a_row: the windows of one draw: members of its cluster that follow each other in the batch.

        Raises:
            DataError: weights that do not fit the index, phases out of order, or a batch size that is not a positive multiple
                of `windows_in_a_row`.
        """
        if global_batch_size < 1 or global_batch_size % windows_in_a_row:
            raise DataError(
                f"global_batch_size is {global_batch_size}: it must be a positive multiple of {windows_in_a_row}"
            )
        self._row, self._draws = windows_in_a_row, global_batch_size // windows_in_a_row
        self._index, self._sizes = index, index.sizes
        self._keys = mix(mix(np.array([int(seed) % 2**64], np.uint64)) + np.arange(len(self._sizes), dtype=np.uint64))
        self._phases: list[_Phase] = []
        for start, raw in _phases(weights):
            values = self._fitting(raw)
            if not self._phases:
                self._phases.append(_Phase(start, values, _Schedule(values), np.zeros_like(self._sizes)))
            elif not np.array_equal(values, self._phases[-1].weights):  # equal weights continue the phase
                self._phases.append(_Phase(start, values, _Schedule(values), self.counts(start)))

    def draw(self, step: int) -> StepDraw:
        """The windows of optimizer step `step`, from 0. All steps take equally long to draw.

        Raises:
            DataError: step < 0.
        """
        return StepDraw(self.draw_steps(range(step, step + 1))[0])

    def draw_steps(self, steps: range) -> tuple[np.ndarray, np.ndarray]:
        """Window ids of consecutive steps, and the cluster of each, both (len(steps) * B,) int64.

        Args:
            steps: all in one phase.

        Raises:
            DataError: a step < 0.
        """
        clusters, ranks = self._locate(steps)
        sizes = self._sizes[clusters]
        epochs, places = np.divmod(ranks, sizes)
        keys = mix(self._keys[clusters] + epochs.astype(np.uint64))
        return self._index.members(clusters, shuffled(places, sizes=sizes, keys=keys)), clusters

    def counts(self, steps: int) -> np.ndarray:
        """Windows of each cluster in the first `steps` steps, (K,) int64. O(K).

        Raises:
            DataError: steps < 0.
        """
        phase = self._phase(steps)
        return phase.consumed + self._row * phase.schedule.counts((steps - phase.start) * self._draws)

    def report(self, steps: int) -> StreamReport:
        """What the first `steps` optimizer steps read; phases weigh by their numbers of steps.

        Raises:
            DataError: steps < 1.
        """
        if steps < 1:
            raise DataError(f"steps must be at least 1 (got {steps})")
        bounds = [min(phase.start, steps) for phase in self._phases] + [steps]
        spans = [end - start for start, end in itertools.pairwise(bounds)]
        weights = sum(span / steps * phase.weights for span, phase in zip(spans, self._phases, strict=True))
        per_window = weights / np.maximum(self._sizes, 1)
        windows = steps * self._draws * self._row
        repeats = windows * per_window
        return StreamReport(
            effective_sample_size=1.0 / math.fsum(weights * per_window),
            windows_drawn=windows,
            expected_repeats=repeats,
            max_repeats=float(repeats.max()),
            warnings=_repeat_warnings(repeats, self._sizes),
        )

    def _locate(self, steps: range) -> tuple[np.ndarray, np.ndarray]:
        """The cluster of each window of some steps, and how many windows of the cluster were drawn before, both int64."""
        phase = self._phase(steps.start)
        assert phase is self._phase(steps[-1])
        draws = range((steps.start - phase.start) * self._draws, (steps.stop - phase.start) * self._draws)
        clusters, ranks = phase.schedule.locate(np.arange(draws.start, draws.stop))
        clusters = np.repeat(clusters, self._row)
        ranks = (self._row * ranks[:, None] + np.arange(self._row)).ravel()
        return clusters, ranks + phase.consumed[clusters]

    def _phase(self, step: int) -> _Phase:
        if step < 0:
            raise DataError(f"step is {step}: steps count from 0")
        return self._phases[bisect.bisect_right(self._phases, step, key=lambda phase: phase.start) - 1]

    def _fitting(self, raw: np.ndarray) -> np.ndarray:
        """Normalized weights (K,), which must fit the index."""
        values = frequencies(raw, k=len(self._sizes), name="weights")
        empty = np.flatnonzero((values > 0) & (self._sizes == 0))
        if empty.size:
            raise DataError(
                f"cluster {empty[0]} has weight {values[empty[0]]:.3g} but no windows ({empty.size} such clusters): "
                "set their weights to 0, as importance_weights does"
            )
        return values


def _phases(weights: np.ndarray | Sequence[tuple[int, np.ndarray]]) -> Sequence[tuple[int, np.ndarray]]:
    """The weights as phases; a single array is one phase from step 0."""
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
