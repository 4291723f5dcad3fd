"""This process's share of the global batches."""

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np

from megatron_specialm.data.sampling import StreamReport
from megatron_specialm.data.store import Batch, TokenStore


class Windows(Protocol):
    """Windows by id: a token store, or several as one."""

    def __len__(self) -> int: ...

    def batch(self, ids: np.ndarray) -> Batch:
        """The windows of `ids` (B,)."""


class Stream(Protocol):
    """An order of reading, as a pure function of the step."""

    def global_batch(self, step: int) -> np.ndarray:
        """Window ids (B,) of optimizer step `step`, from 0."""

    def report(self, steps: int) -> StreamReport:
        """What a run of so many steps will read."""


# What else a training needs to know of a step's windows: from the step, the rows that are this process's, and their ids.
Notes = Callable[[int, slice, np.ndarray], Mapping[str, np.ndarray]]


class TrainingBatches:
    """Batches of a stream of window ids. The global batch of a step is the same whatever the number of processes."""

    def __init__(
        self, store: Windows, stream: Stream, *, rank: int, processes: int, notes: Notes = lambda *_: {}
    ) -> None:
        self._store, self._stream, self._rank, self.processes = store, stream, rank, processes
        self._notes = notes

    def local(self, step: int) -> Batch:
        """The rows of optimizer step `step` (0-based) that fall to this process: a contiguous share."""
        ids = self._stream.global_batch(step)
        share = len(ids) // self.processes
        rows = slice(self._rank * share, (self._rank + 1) * share)
        return self._store.batch(ids[rows])._replace(extra_inputs=self._notes(step, rows, ids[rows]))


def count_windows(batch: Batch) -> int:
    """B."""
    return len(batch.tokens)


def evaluation_batches(store: TokenStore, *, batch_size: int, max_windows: int | None = None) -> Iterator[Batch]:
    """Every window of a store once, or `max_windows` evenly spread ones."""
    count = len(store) if max_windows is None else min(max_windows, len(store))
    ids = np.linspace(0, len(store) - 1, count).round().astype(np.int64)
    for start in range(0, len(ids), batch_size):
        yield store.batch(ids[start : start + batch_size])
