"""The token store: windows of token ids on megatron-core's IndexedDataset, one sequence per window.

    train.bin  train.idx  validation.bin ... test.idx     the tokens, and the start of each window and document
    store.json                                            written last: sizes of the files, counts, tokenizer

A document is cut into windows that do not overlap; its last window ends with the end-of-document token. A set that was
tokenized in shards has no files of its own: `store.json` names the shards' folders, and their windows are read in that order.

Legend: B windows of a batch, T context length, N windows of a split.
"""

import logging
import os
import resource
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np

from megatron_specialm.base.arrays import read_values
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import REMAKE, fsync_path, named, read_json, write_json
from megatron_specialm.base.shapes import Count, Size
from megatron_specialm.data.index import read_index

DESCRIPTION = "store.json"
# The extra input (B, K) float32, of a model with an expert per cluster: which expert or mixture of them computes each window.
MIXTURE = "mixture"
SPLITS = ("train", "validation", "test")
COUNTS = ("documents", "windows", "tokens", "skipped")

logging.getLogger("megatron.core.datasets.indexed_dataset").setLevel(logging.WARNING)  # it logs each file that it opens


@dataclass(frozen=True)
class Part:
    """A pair of files in `store.json`: their folder, and their sizes by name."""

    folder: str
    bytes: dict[str, Count]


@dataclass(frozen=True)
class Split:
    """A split in `store.json`, either with files (`bytes`) or with those of shards (`parts`).

    `text_bytes`: the UTF-8 bytes of its documents; None for training documents, and in stores of earlier versions.
    """

    documents: Count
    windows: Count
    tokens: Count
    skipped: Count = 0
    text_bytes: Count | None = None
    bytes: dict[str, Count] | None = None
    parts: list[Part] | None = None

    @property
    def files(self) -> list[Part]:
        """The pairs of files: the store's own, or one per shard."""
        return self.parts or [Part(".", self.bytes or {})]


@dataclass(frozen=True)
class Description:
    """The content of `store.json`. `tokenizer`: its fingerprint; `eod`: the id of the end-of-document token; `bos`: that of the
    token before each window, if it is another."""

    tokenizer: str
    context_length: Size
    vocabulary_size: Size
    eod: Count
    splits: dict[str, Split]
    bos: Count | None = None


class Batch(NamedTuple):
    """tokens, targets (B, T) int64; mask (B, T) float32, 1 where a target counts; and by name what else a training
    needs to know of its windows, (B, ...) each.

    Of a packed batch (`data/packing.py`) B is 1, `lengths` are those of the W windows that stand behind each other in the one
    sequence, and MIXTURE is (W, K).
    """

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    extra_inputs: Mapping[str, np.ndarray] = MappingProxyType({})
    lengths: tuple[int, ...] | None = None

    def rows(self, rows: slice | np.ndarray) -> "Batch":
        """Some of the windows."""
        return self._map(lambda part: part[rows])

    def positions(self, count: int) -> "Batch":
        """The first positions of each window."""
        extra_inputs = {
            name: value if name == MIXTURE else value[:, :count] for name, value in self.extra_inputs.items()
        }
        return Batch(self.tokens[:, :count], self.targets[:, :count], self.mask[:, :count], extra_inputs)

    def padded(self, count: int) -> "Batch":
        """The batch with `count` more windows, whose mask is zero."""
        if not count:
            return self
        return self._map(lambda part: np.pad(part, ((0, count), *[(0, 0)] * (part.ndim - 1))))

    def _map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Batch":
        extra_inputs = {name: change(value) for name, value in self.extra_inputs.items()}
        return Batch(change(self.tokens), change(self.targets), change(self.mask), extra_inputs)


class _Part:
    """The windows of one pair of files, memory-mapped."""

    def __init__(self, folder: Path, split: str, part: Part, description: Description) -> None:
        self._path, self._longest = folder / f"{split}.idx", description.context_length
        dtype = token_type(description.vocabulary_size)
        self._lengths, self._starts = read_index(self._path, dtype=dtype)
        self._tokens = read_values(folder / f"{split}.bin", dtype=dtype, shape=(None,), mapped=True)

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        return len(self._tokens)

    @property
    def keys_saved(self) -> int:
        lengths = self._lengths.astype(np.int64)
        return int((lengths * (self._longest - lengths)).sum())

    def window(self, index: int) -> np.ndarray:
        start, rest = divmod(int(self._starts[index]), self._tokens.itemsize)
        length = int(self._lengths[index])
        if rest or start < 0 or not 0 < length <= self._longest or start + length > len(self._tokens):
            raise ArtifactError(
                f"{self._path}: window {index} has {length} tokens from {start + rest / self._tokens.itemsize:g} on, of "
                f"{len(self._tokens)} in windows of at most {self._longest}: {REMAKE}"
            )
        return self._tokens[start : start + length]


class TokenStore:
    """The windows of one split. Tokens and index are memory-mapped; a few hundred bytes per shard are in memory."""

    def __init__(self, folder: Path, split: str, description: Description) -> None:
        self.folder, self._split = folder, split
        self.context_length = description.context_length
        self.vocabulary_size = description.vocabulary_size
        self.eod = description.eod
        self.bos = self.eod if description.bos is None else description.bos
        self.tokenizer = description.tokenizer  # its fingerprint
        self.tokens = description.splits[split].tokens  # of all windows
        self.text_bytes = description.splits[split].text_bytes  # of all documents; None if unknown
        parts = description.splits[split].files
        _allow_open_files(2 * len(parts))
        self._parts = [_Part(folder / part.folder, split, part, description) for part in parts]
        self._firsts = np.cumsum([0, *map(len, self._parts)])  # the number of each part's first window; last, N
        found, expected = (len(self), sum(part.tokens for part in self._parts)), description.splits[split]
        if found != (expected.windows, expected.tokens):
            raise ArtifactError(
                f"{folder / DESCRIPTION}: {expected.windows} windows of {expected.tokens} tokens in {split}, and its files "
                f"have {found[0]} of {found[1]}: {REMAKE}"
            )

    @classmethod
    def open(cls, folder: Path, split: str, *, tokenizer: str | None = None) -> Self:
        """Open a split.

        Args:
            tokenizer: the fingerprint that the store must have; None for any.

        Raises:
            ArtifactError: no such split, a file of another size or kind than was written, or another tokenizer.
        """
        description = read_json(folder / DESCRIPTION, Description)
        if tokenizer is not None and tokenizer != description.tokenizer:
            raise ArtifactError(
                f"{folder}: made with the tokenizer {description.tokenizer}, not {tokenizer}: "
                "run the tokenize stage again with the tokenizer that is wanted"
            )
        if split not in description.splits:
            raise ArtifactError(f"{folder}: has no split {split!r}; it has {', '.join(description.splits)}")
        for part in description.splits[split].files:
            _check_sizes((folder / part.folder).resolve(), part.bytes)
        return cls(folder, split, description)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def keys_saved(self) -> int:
        """`estimate.flops.keys_saved` of all windows without padding. It reads the index."""
        return sum(part.keys_saved for part in self._parts)

    def window(self, index: int) -> np.ndarray:
        """The token ids of a window (at most T). The last window of a document ends with the end-of-document token.

        Raises:
            ArtifactError: there is no such window, or the file is damaged there.
        """
        (window,) = self._windows(np.array([index]))
        return self._checked(window)

    def batch(self, ids: np.ndarray) -> Batch:
        """The windows of `ids` (B,) as model input: the start token, then the window without its last token.

        So every token of a window is predicted exactly once. Padding is the end-of-document token with mask 0.

        Raises:
            ArtifactError: there is no such window, or the file is damaged there.
        """
        targets = np.full((len(ids), self.context_length), self.eod, np.int64)
        mask = np.zeros((len(ids), self.context_length), np.float32)
        for target, counts, window in zip(targets, mask, self._windows(ids), strict=True):
            target[: len(window)], counts[: len(window)] = window, 1
        tokens = np.roll(self._checked(targets), 1, axis=1)
        tokens[:, 0] = self.bos
        return Batch(tokens, targets, mask)

    def _windows(self, ids: np.ndarray) -> Iterable[np.ndarray]:
        """The token ids of each of the windows `ids` (B,)."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self):
            raise ArtifactError(
                f"{self.folder}: has windows 0 to {len(self) - 1}, and windows {ids.min()} to {ids.max()} are asked for: what "
                f"names them is damaged or of another set: {REMAKE}"
            )
        parts = np.searchsorted(self._firsts, ids, side="right") - 1
        places = ids - self._firsts[parts]
        return (self._parts[part].window(place) for part, place in zip(parts.tolist(), places.tolist(), strict=True))

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """The same tokens. Refuses ids outside the vocabulary, for which an embedding table has no row."""
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocabulary_size:
            raise ArtifactError(
                f"{self.folder}: {self._split}.bin, of it or of one of its shards, has token ids from {tokens.min()} to "
                f"{tokens.max()} for a vocabulary of {self.vocabulary_size}: {REMAKE}"
            )
        return tokens


def token_type(vocabulary_size: int) -> type[np.integer]:
    """The integer type of stored token ids."""
    return np.uint16 if vocabulary_size < 65_500 else np.int32


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
    """Raise this process's limit of open files, as far as allowed, for `count` more. Python keeps mapped files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + len(os.listdir("/proc/self/fd")) + 256  # room for what else the process opens
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))


class StoreWriter:
    """Writes the windows of one split. The store cannot be opened before `describe_store` has written `store.json`."""

    def __init__(self, folder: Path, split: str, *, context_length: int, vocabulary_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # takes seconds; readers do without

        self._tokens_path, self._index_path = (folder / f"{split}{suffix}" for suffix in (".bin", ".idx"))
        self._context_length = context_length
        self._builder = IndexedDatasetBuilder(str(self._tokens_path), dtype=token_type(vocabulary_size))
        self._documents = self._windows = self._tokens = 0

    def add_document(self, ids: np.ndarray) -> None:
        """Add a document, or part of one, as windows of T tokens; the last one may be shorter."""
        starts = range(0, len(ids), self._context_length)
        with named(self._tokens_path):
            self._builder.add_document(ids, [min(self._context_length, len(ids) - start) for start in starts])
        self._documents += 1
        self._windows += len(starts)
        self._tokens += len(ids)

    def finish(self) -> dict[str, Any]:
        """Close the files; returns the split for `describe_store`."""
        paths = (self._tokens_path, self._index_path)
        with named(self._index_path):
            self._builder.finalize(str(self._index_path))
        for path in paths:
            fsync_path(path)
        return {
            "documents": self._documents,
            "windows": self._windows,
            "tokens": self._tokens,
            "bytes": {path.name: path.stat().st_size for path in paths},
        }


def join_shards(folders: Iterable[Path], split: str, *, store: Path) -> dict[str, Any]:
    """A split for `describe_store`, with the windows of the shards in `folders`, in that order. `store`: the store's folder."""
    shards = [(os.path.relpath(folder, store), read_json(folder / DESCRIPTION, Description)) for folder in folders]
    splits = [(folder, description.splits[split]) for folder, description in shards]
    return {
        **{name: sum(getattr(own, name) for _, own in splits) for name in COUNTS},
        "parts": [{"folder": folder, "bytes": own.bytes} for folder, own in splits],
    }


def read_counts(folder: Path) -> dict[str, dict[str, int]]:
    """The counts of a store (`COUNTS`), each by split."""
    splits = read_json(folder / DESCRIPTION, Description).splits
    return {name: {split: getattr(own, name) for split, own in splits.items()} for name in COUNTS}


def describe_store(
    folder: Path,
    *,
    splits: Mapping[str, Mapping[str, Any]],
    tokenizer: str,
    context_length: int,
    vocabulary_size: int,
    eod: int,
    bos: int | None = None,
) -> None:
    """Write `store.json`, with which the store can be opened.

    Args:
        splits: the results of `StoreWriter.finish` or `join_shards`, by name.
        tokenizer: the fingerprint of the tokenizer.
    """
    description = {
        "tokenizer": tokenizer,
        "context_length": context_length,
        "vocabulary_size": vocabulary_size,
        "eod": eod,
        **({} if bos in (None, eod) else {"bos": bos}),
        "splits": splits,
    }
    write_json(folder / DESCRIPTION, description)


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
