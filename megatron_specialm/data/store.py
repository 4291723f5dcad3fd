"""The token store: windows of token ids on megatron-core's IndexedDataset, one sequence per window.

    train.bin  train.idx  validation.bin ... test.idx     the tokens, and where each window and document begins
    store.json                                            written last: sizes of the files, counts, tokenizer

A document is cut into windows that do not overlap; its last window ends with the end-of-document token.

Legend: B windows of a batch, T context length, N windows of a split.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import fsync_path, read_json, write_json

DESCRIPTION = "store.json"
MIXTURE = "mixture"  # the note (B, K) float32: which mixture of a projected network's experts computes each window
SPLITS = ("train", "validation", "test")


class Batch(NamedTuple):
    """tokens, targets (B, T) int64; mask (B, T) float32, 1 where a target counts; and by name what else a training
    needs to know of its windows, (B, ...) each."""

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    notes: Mapping[str, np.ndarray] = MappingProxyType({})

    def rows(self, rows: slice) -> "Batch":
        """Some of the windows."""
        return self._map(lambda part: part[rows])

    def padded(self, count: int) -> "Batch":
        """With `count` more windows that do not count."""
        if not count:
            return self
        return self._map(lambda part: np.pad(part, ((0, count), *[(0, 0)] * (part.ndim - 1))))

    def _map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Batch":
        notes = {name: change(note) for name, note in self.notes.items()}
        return Batch(change(self.tokens), change(self.targets), change(self.mask), notes)


class TokenStore:
    """The windows of one split. The tokens are memory-mapped; what is in memory is 20 bytes a window."""

    def __init__(self, folder: Path, split: str, description: Mapping[str, Any]) -> None:
        index = IndexedDataset(str(folder / split))
        self.folder = folder
        self.context_length: int = description["context_length"]
        self.vocabulary_size: int = description["vocabulary_size"]
        self.eod: int = description["eod"]
        self.tokenizer: str = description["tokenizer"]  # its fingerprint
        self.lengths = np.array(index.sequence_lengths)  # (N,) int32: tokens of each window
        # (N,) int64: the number of the document that each window is of
        self.documents = np.repeat(np.arange(len(index.document_indices) - 1), np.diff(index.document_indices))
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        # A plain array on the mapped file: slices of np.memmap itself cost three times as much.
        self._tokens = np.asarray(np.memmap(folder / f"{split}.bin", dtype=index.index.dtype, mode="r"))

    @classmethod
    def open(cls, folder: Path, split: str, *, tokenizer: str | None = None) -> Self:
        """Open a split, and check that it is whole and, given a fingerprint, of that tokenizer.

        Raises:
            ArtifactError: no such split, a file of another size than was written, or another tokenizer.
        """
        description = read_json(folder / DESCRIPTION)
        if tokenizer is not None and tokenizer != description["tokenizer"]:
            raise ArtifactError(
                f"{folder}: made with the tokenizer {description['tokenizer']}, not {tokenizer}: "
                "run the tokenize stage again with the tokenizer that is wanted"
            )
        if split not in description["splits"]:
            raise ArtifactError(f"{folder}: has no split {split!r}; it has {', '.join(description['splits'])}")
        for name, size in description["splits"][split]["bytes"].items():
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"{path}: missing, though {DESCRIPTION} lists it: run the tokenize stage again")
            if path.stat().st_size != size:
                raise ArtifactError(
                    f"{path}: {path.stat().st_size} bytes, {DESCRIPTION} says {size}: cut short or overwritten: "
                    "remove the folder and run the tokenize stage again"
                )
        return cls(folder, split, description)

    def __len__(self) -> int:
        return len(self.lengths)

    def window(self, index: int) -> np.ndarray:
        """The token ids of a window (at most T), the end-of-document token included where it ends its document."""
        end = self._ends[index]
        return self._tokens[end - self.lengths[index] : end]

    def batch(self, ids: np.ndarray) -> Batch:
        """The windows of `ids` (B,) as model input: the end-of-document token, then the window less its last token.

        So every token of a window is predicted exactly once. Padding is the end-of-document token with mask 0.
        """
        lengths, ends = self.lengths[ids], self._ends[ids]
        targets = np.full((len(ids), self.context_length), self.eod, np.int64)
        for row, end, length in zip(targets, ends.tolist(), lengths.tolist(), strict=True):
            row[:length] = self._tokens[end - length : end]
        tokens = np.roll(targets, 1, axis=1)
        tokens[:, 0] = self.eod
        mask = (np.arange(self.context_length) < lengths[:, None]).astype(np.float32)
        return Batch(tokens, targets, mask)


class StoreWriter:
    """Writes the windows of one split. Nothing is readable before `describe_store` has written `store.json`."""

    def __init__(self, folder: Path, split: str, *, context_length: int, vocabulary_size: int) -> None:
        self._folder, self._split = folder, split
        self._context_length = context_length
        dtype = np.uint16 if vocabulary_size < 65_500 else np.int32
        self._builder = IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=dtype)
        self._documents = self._windows = self._tokens = 0

    def add_document(self, ids: np.ndarray) -> None:
        """Add a document (or part of one) as windows of T tokens, the last one being what is left."""
        starts = range(0, len(ids), self._context_length)
        self._builder.add_document(ids, [min(self._context_length, len(ids) - start) for start in starts])
        self._documents += 1
        self._windows += len(starts)
        self._tokens += len(ids)

    def finish(self) -> dict[str, Any]:
        """Close the files; returns the split's part of the description."""
        paths = [self._folder / f"{self._split}{suffix}" for suffix in (".bin", ".idx")]
        self._builder.finalize(str(paths[1]))
        for path in paths:
            fsync_path(path)
        return {
            "documents": self._documents,
            "windows": self._windows,
            "tokens": self._tokens,
            "bytes": {path.name: path.stat().st_size for path in paths},
        }


def describe_store(
    folder: Path,
    *,
    splits: Mapping[str, Mapping[str, Any]],
    tokenizer: str,
    context_length: int,
    vocabulary_size: int,
    eod: int,
) -> None:
    """Write `store.json`: from here on the store can be opened.

    Args:
        splits: what `StoreWriter.finish` returned of each.
        tokenizer: the fingerprint of the tokenizer.
    """
    description = {
        "tokenizer": tokenizer,
        "context_length": context_length,
        "vocabulary_size": vocabulary_size,
        "eod": eod,
        "splits": splits,
    }
    write_json(folder / DESCRIPTION, description)
