"""The token store: windows of token ids on megatron-core's IndexedDataset, one sequence per window.

    train.bin  train.idx  validation.bin ... test.idx     the tokens, and where each window and document begins
    store.json                                            written last: sizes of the files, counts, tokenizer

A document is cut into windows that do not overlap; its last window ends with the end-of-document token. A split of a set
that was tokenized in shards has no files of its own here: `store.json` names the shards' folders, and their windows are
read in a row.

Legend: B windows of a batch, T context length, N windows of a split.
"""

import logging
import os
import resource
from collections.abc import Callable, Iterable, Mapping
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
COUNTS = ("documents", "windows", "tokens", "skipped")

logging.getLogger("megatron.core.datasets.indexed_dataset").setLevel(logging.WARNING)  # it tells of each file it opens


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


class _Part:
    """The windows of one pair of files, all mapped: what a process keeps does not grow with them."""

    def __init__(self, folder: Path, split: str) -> None:
        self._index = index = IndexedDataset(
            str(folder / split), mmap=False
        ).index  # to be kept: its end unmaps the file
        self._lengths, self._starts = index.sequence_lengths, index.sequence_pointers  # in tokens, and in bytes
        # A plain array on the mapped file: slices of np.memmap itself cost three times as much.
        tokens = folder / f"{split}.bin"
        is_empty = not len(index) and tokens.stat().st_size == 0  # which cannot be mapped
        mapped = np.empty(0, index.dtype) if is_empty else np.memmap(tokens, dtype=index.dtype, mode="r")
        self._tokens = np.asarray(mapped)

    def __len__(self) -> int:
        return len(self._lengths)

    def window(self, index: int) -> np.ndarray:
        start = int(self._starts[index]) // self._tokens.itemsize
        return self._tokens[start : start + int(self._lengths[index])]


class TokenStore:
    """The windows of one split. Tokens and their index are memory-mapped: in memory are a few hundred bytes per shard."""

    def __init__(self, folder: Path, split: str, description: Mapping[str, Any]) -> None:
        self.folder = folder
        self.context_length: int = description["context_length"]
        self.vocabulary_size: int = description["vocabulary_size"]
        self.eod: int = description["eod"]
        self.tokenizer: str = description["tokenizer"]  # its fingerprint
        self.tokens: int = description["splits"][split]["tokens"]  # of all windows
        folders = [folder / part["folder"] for part in _parts(description["splits"][split])]
        _allow_open_files(2 * len(folders))
        self._parts = [_Part(part, split) for part in folders]
        self._firsts = np.cumsum([0, *map(len, self._parts)])  # the number of each part's first window; last, N

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
        for part in _parts(description["splits"][split]):
            _check_sizes((folder / part["folder"]).resolve(), part["bytes"])
        return cls(folder, split, description)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def window(self, index: int) -> np.ndarray:
        """The token ids of a window (at most T), the end-of-document token included where it ends its document."""
        (window,) = self._windows(np.array([index]))
        return window

    def batch(self, ids: np.ndarray) -> Batch:
        """The windows of `ids` (B,) as model input: the end-of-document token, then the window less its last token.

        So every token of a window is predicted exactly once. Padding is the end-of-document token with mask 0.
        """
        targets = np.full((len(ids), self.context_length), self.eod, np.int64)
        mask = np.zeros((len(ids), self.context_length), np.float32)
        for target, counts, window in zip(targets, mask, self._windows(ids), strict=True):
            target[: len(window)], counts[: len(window)] = window, 1
        tokens = np.roll(targets, 1, axis=1)
        tokens[:, 0] = self.eod
        return Batch(tokens, targets, mask)

    def _windows(self, ids: np.ndarray) -> Iterable[np.ndarray]:
        """The token ids of each of the windows `ids` (B,)."""
        parts = np.searchsorted(self._firsts, ids, side="right") - 1
        places = ids - self._firsts[parts]
        return (self._parts[part].window(place) for part, place in zip(parts.tolist(), places.tolist(), strict=True))


def _parts(split: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The folders that hold a split's files, each with their sizes: the store's own, or those of its shards."""
    return split.get("parts") or [{"folder": ".", "bytes": split["bytes"]}]


def _check_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, though {DESCRIPTION} lists it: run the tokenize stage again")
        if path.stat().st_size != size:
            raise ArtifactError(
                f"{path}: {path.stat().st_size} bytes, {DESCRIPTION} says {size}: cut short or overwritten: "
                "remove the folder and run the tokenize stage again"
            )


def _allow_open_files(count: int) -> None:
    """Python keeps a mapped file open: lift this process's limit, as far as it may, where many shards would exceed it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + len(os.listdir("/proc/self/fd")) + 256  # room for what else the process opens
    if soft != resource.RLIM_INFINITY and soft < wanted:
        lifted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lifted, hard))


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


def join_shards(folders: Iterable[Path], split: str, *, store: Path) -> dict[str, Any]:
    """A split's part of the description of `store`, whose windows are those of the shards in `folders`, in that order."""
    shards = [(os.path.relpath(folder, store), read_json(folder / DESCRIPTION)["splits"][split]) for folder in folders]
    return {
        **{name: sum(shard[name] for _, shard in shards) for name in COUNTS},
        "parts": [{"folder": folder, "bytes": shard["bytes"]} for folder, shard in shards],
    }


def read_counts(folder: Path) -> dict[str, dict[str, int]]:
    """A store's counts (`COUNTS`), each by split."""
    splits = read_json(folder / DESCRIPTION)["splits"]
    return {name: {split: part[name] for split, part in splits.items()} for name in COUNTS}


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
        splits: what `StoreWriter.finish` or `join_shards` returned of each.
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
