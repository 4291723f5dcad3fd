"""This process's share of the global batches."""

from collections.abc import Iterator

import numpy as np

from megatron_specialm.data.sampling import ImportanceStream
from megatron_specialm.data.store import Batch, TokenStore


class TrainingBatches:
    """Batches of a stream of window ids. The global batch of a step is the same whatever the number of processes."""

    def __init__(self, store: TokenStore, stream: ImportanceStream, *, rank: int, processes: int) -> None:
        self._store, self._stream, self._rank, self._processes = store, stream, rank, processes

    def local(self, step: int) -> Batch:
        """The rows of optimizer step `step` (0-based) that fall to this process: a contiguous share."""
        ids = self._stream.global_batch(step)
        share = len(ids) // self._processes
        return self._store.batch(ids[self._rank * share : (self._rank + 1) * share])


def evaluation_batches(
    store: TokenStore, *, batch_size: int, rank: int = 0, processes: int = 1, max_windows: int | None = None
) -> Iterator[Batch]:
    """Every window of a store once, or `max_windows` evenly spread ones, dealt out over the processes."""
    count = len(store) if max_windows is None else min(max_windows, len(store))
    ids = np.linspace(0, len(store) - 1, count).round().astype(np.int64)[rank::processes]
    for start in range(0, len(ids), batch_size):
        yield store.batch(ids[start : start + batch_size])
