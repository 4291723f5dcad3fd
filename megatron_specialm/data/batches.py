"""Batches for training, of which each process gets its rows, and for evaluation."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from megatron_specialm.data.sampling import StepDraw, StreamReport
from megatron_specialm.data.store import MIXTURE, Batch, TokenStore


class Windows(Protocol):
    """Windows by id: a token store, or several as one."""

    def __len__(self) -> int: ...

    def batch(self, ids: np.ndarray) -> Batch:
        """The windows of `ids` (B,)."""


class Stream(Protocol):
    """What each step reads, as a pure function of the step."""

    def draw(self, step: int) -> StepDraw:
        """The global batch of optimizer step `step`, from 0."""

    def report(self, steps: int) -> StreamReport:
        """What the first `steps` steps read."""


# Further inputs of the windows (B,): arrays (B, ...) by name.
ExtraInputs = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class TrainingBatches:
    """The global batches of a stream, which do not depend on the number of processes.

    Args:
        rank, processes: the data-parallel rank of this process, and their number.
        extra_inputs: for example the outputs of a teacher (`data/teacher.py`).
    """

    def __init__(
        self, store: Windows, stream: Stream, *, rank: int, processes: int, extra_inputs: ExtraInputs = lambda _: {}
    ) -> None:
        self._store, self._stream, self._rank, self.processes = store, stream, rank, processes
        self._extra_inputs = extra_inputs

    def local(self, step: int) -> Batch:
        """This process's rows of the global batch of optimizer step `step`, from 0: a contiguous slice."""
        draw = self._stream.draw(step)
        count = len(draw.window_ids) // self.processes
        rows = slice(self._rank * count, (self._rank + 1) * count)
        ids = draw.window_ids[rows]
        extra_inputs = dict(self._extra_inputs(ids))
        if draw.mixtures is not None:
            extra_inputs[MIXTURE] = draw.mixtures[rows]
        return self._store.batch(ids)._replace(extra_inputs=extra_inputs)


def count_windows(batch: Batch) -> int:
    """B."""
    return len(batch.tokens)


def evaluation_batches(store: TokenStore, *, batch_size: int, max_windows: int | None = None) -> Iterator[Batch]:
    """Every window of a store once, or `max_windows` evenly spread ones."""
    count = len(store) if max_windows is None else min(max_windows, len(store))
    ids = np.linspace(0, len(store) - 1, count).round().astype(np.int64)
    for start in range(0, len(ids), batch_size):
        yield store.batch(ids[start : start + batch_size])
