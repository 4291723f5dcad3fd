"""The vectors of a set's windows, in one file or in one per shard, and the windows that an encoder does not cover: their
vectors are zero, so they all get the same cluster, whatever their subject.

vectors.json   rows and dimensions, and each file in order: its path relative to this folder, rows, bytes, zero vectors
train.npy      (N, E) float32, in the order of the token store; absent if the shards hold the files
"""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_specialm.base.arrays import read_array
from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.base.shapes import Count, Size

DESCRIPTION = "vectors.json"
FILE = "train.npy"
WARNED = 0.01  # fraction of zero vectors of a set: a few such windows are short ends of documents
REFUSED = 0.5  # at least that fraction is an error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One file of `vectors.json`. `zero`: how many of its vectors are zero."""

    path: str
    rows: Count
    bytes: Count
    zero: Count


@dataclass(frozen=True)
class Description:
    """The content of `vectors.json`."""

    rows: Count
    dimensions: Size
    parts: list[Part]


class Vectors:
    """Vectors (N, E) as one array that is read in parts. Files are memory-mapped only during a read."""

    def __init__(self, folder: Path) -> None:
        """Open the vectors that an embed task wrote.

        Raises:
            ArtifactError: a file is missing or has another size than was written.
        """
        description = read_json(folder / DESCRIPTION, Description)
        self._files = [((folder / part.path).resolve(), part.rows) for part in description.parts]
        for (path, _), part in zip(self._files, description.parts, strict=True):
            found = path.stat().st_size if path.is_file() else 0
            if found != part.bytes:
                raise ArtifactError(
                    f"{path}: {found} bytes, {folder / DESCRIPTION} says {part.bytes}: missing, cut short or "
                    "overwritten: remove its folder and run the embed stage again"
                )
        self._firsts = np.cumsum([0, *(part.rows for part in description.parts)])  # of each file; last, N
        self.shape: tuple[int, int] = (int(self._firsts[-1]), description.dimensions)
        self.zero: int = sum(part.zero for part in description.parts)
        for number in range(len(self._files)):
            self._map(number)

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of some windows, (B, E) float32, which may not be finite.

        Args:
            ids: (B,) window numbers, ascending.
        """
        vectors = np.empty((len(ids), self.shape[1]), np.float32)
        ends = np.searchsorted(ids, self._firsts)  # of each file's ids in `ids`
        for number, (first, start, stop) in enumerate(zip(self._firsts, ends, ends[1:], strict=False)):
            if start < stop:
                vectors[start:stop] = self._map(number)[ids[start:stop] - first]
        return vectors

    def _map(self, number: int) -> np.ndarray:
        path, rows = self._files[number]
        return read_array(path, dtype=np.float32, shape=(rows, self.shape[1]), mapped=True)


def read_rows(vectors: np.ndarray | Vectors, ids: np.ndarray) -> np.ndarray:
    """Some vectors in memory, (B, E) float32.

    Args:
        ids: (B,) window numbers, ascending.
    """
    part = vectors.rows(ids) if isinstance(vectors, Vectors) else vectors[ids]
    return np.ascontiguousarray(part, dtype=np.float32)


def count_not_finite(vectors: np.ndarray) -> int:
    """How many vectors (B, E) hold NaN or infinity."""
    return int((~np.isfinite(vectors).all(axis=1)).sum())


def refuse_not_finite(count: int, *, of: int) -> None:
    """Raise if `count` of `of` vectors are not finite. Ranks sum their counts first, so that all of them raise.

    Raises:
        DataError: count > 0.
    """
    if count:
        raise DataError(f"{count} of {of} vectors are not finite: the encoder gave NaN or infinity")


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, (n, E) float32; rows of zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def describe_vectors(folder: Path, *, zero: int = 0) -> None:
    """Write `vectors.json` for the one file in the folder, `zero` of whose vectors are zero."""
    path = folder / FILE
    rows, dimensions = read_array(path, dtype=np.float32, shape=(None, None), mapped=True).shape
    _write(folder, dimensions, [Part(FILE, rows, path.stat().st_size, zero)])


def join_vectors(folders: Iterable[Path], *, folder: Path) -> None:
    """Write `vectors.json` in `folder` for the files of shards, in their order, as one array."""
    shards = [(os.path.relpath(shard, folder), read_json(shard / DESCRIPTION, Description)) for shard in folders]
    parts = [replace(part, path=f"{path}/{part.path}") for path, shard in shards for part in shard.parts]
    _write(folder, shards[0][1].dimensions, parts)


def _write(folder: Path, dimensions: int, parts: Sequence[Part]) -> None:
    rows = sum(part.rows for part in parts)
    write_json(folder / DESCRIPTION, asdict(Description(rows, dimensions, list(parts))))


def count_zero(vectors: np.ndarray, *, name: str, first: int) -> int:
    """The number of zero vectors among (n, E) vectors.

    Args:
        name: the set, for messages.
        first: the number of the first window, for messages.

    Raises:
        DataError: a vector is not finite.
    """
    if bad := count_not_finite(vectors):
        raise DataError(
            f"text {name!r}: the vectors of {bad} of {len(vectors)} windows from {first} on are not finite: the encoder gave "
            "NaN or infinity: use precision fp32 or another encoder"
        )
    return int((~vectors.any(axis=1)).sum())


def check_coverage(name: str, *, zero: int, windows: int) -> None:
    """Warn if more than a few windows of a set have zero vectors.

    Raises:
        DataError: at least half of them have.
    """
    fraction = zero / max(windows, 1)
    found = f"text {name!r}: the encoder knows nothing of {zero} of {windows} windows ({fraction:.1%})"
    if fraction >= REFUSED:
        raise DataError(
            f"{found}: they would all be one cluster: use an encoder for this language (static, sentence-bert), raise "
            "encoder.vocabulary_size, or add text of the kind to the generic set"
        )
    if fraction > WARNED:
        logger.warning("%s: they are one cluster, whatever they are about", found)
