"""Two token stores read as one: a domain's windows among generic ones, or the other way round."""

from pathlib import Path

import numpy as np

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.data.store import Batch, TokenStore


class JoinedStore:
    """The windows of `first`, followed by those of `second`."""

    def __init__(self, first: TokenStore, second: TokenStore) -> None:
        """Raises:
        ArtifactError: their windows are of different lengths.
        """
        if first.context_length != second.context_length:
            raise ArtifactError(
                f"{first.folder} has windows of {first.context_length} tokens and {second.folder} of "
                f"{second.context_length}: tokenize both with one context_length"
            )
        self._first, self._second = first, second
        self.context_length, self.vocabulary_size = first.context_length, first.vocabulary_size

    @property
    def folder(self) -> Path:
        """The folder of the first store."""
        return self._first.folder

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def batch(self, ids: np.ndarray) -> Batch:
        """The windows of `ids` (B,), in their order; see `TokenStore.batch`."""
        size = len(self._first)
        parts = ((self._first, ids < size, 0), (self._second, ids >= size, size))
        found = [(here, store.batch(ids[here] - shift)) for store, here, shift in parts if here.any()]
        order = np.argsort(np.concatenate([np.flatnonzero(here) for here, _ in found]))
        tokens, targets, mask = (
            np.concatenate([getattr(batch, field) for _, batch in found])[order]
            for field in ("tokens", "targets", "mask")
        )
        return Batch(tokens, targets, mask)
