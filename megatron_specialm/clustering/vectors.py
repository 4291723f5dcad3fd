"""The vectors of a set's train windows, in one file or in those of its shards.

vectors.json   rows and dimensions, and of each file in order: its path from here, its rows, its size, and how many of its
               vectors are zero
train.npy      (N, E) float32, in the token store's order; absent where the files are those of shards
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json, write_json

DESCRIPTION = "vectors.json"
FILE = "train.npy"


class Vectors:
    """Vectors (N, E) as one array that is read in parts. The files are memory-mapped while they are read, so nothing is
    kept of them."""

    def __init__(self, folder: Path) -> None:
        """Open what an embed task has made, and check that it is whole.

        Raises:
            ArtifactError: nothing there, or a file that is missing or of another size than was written.
        """
        description = read_json(folder / DESCRIPTION)
        self._files = [(folder / part["path"]).resolve() for part in description["parts"]]
        for path, part in zip(self._files, description["parts"], strict=True):
            found = path.stat().st_size if path.is_file() else 0
            if found != part["bytes"]:
                raise ArtifactError(
                    f"{path}: {found} bytes, {folder / DESCRIPTION} says {part['bytes']}: missing, cut short or "
                    "overwritten: remove its folder and run the embed stage again"
                )
        self._firsts = np.cumsum([0, *(part["rows"] for part in description["parts"])])  # of each file; last, N
        self.shape: tuple[int, int] = (int(self._firsts[-1]), description["dimensions"])
        self.zero: int = sum(part["zero"] for part in description["parts"])

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The vectors of some windows, (B, E) float32.

        Args:
            ids: (B,) window numbers, ascending.
        """
        vectors = np.empty((len(ids), self.shape[1]), np.float32)
        ends = np.searchsorted(ids, self._firsts)  # where in `ids` each file's own begin
        for path, first, start, stop in zip(self._files, self._firsts, ends, ends[1:], strict=False):
            if start < stop:
                vectors[start:stop] = np.load(path, mmap_mode="r", allow_pickle=False)[ids[start:stop] - first]
        return vectors


def describe_vectors(folder: Path, *, zero: int = 0) -> None:
    """Describe the one file that stands in the folder, of whose vectors so many are zero."""
    path = folder / FILE
    rows, dimensions = np.load(path, mmap_mode="r", allow_pickle=False).shape
    _write(folder, dimensions, [{"path": FILE, "rows": rows, "bytes": path.stat().st_size, "zero": zero}])


def join_vectors(folders: Iterable[Path], *, folder: Path) -> None:
    """Describe in `folder` the files of shards, in their order, as one array."""
    shards = [(os.path.relpath(shard, folder), read_json(shard / DESCRIPTION)) for shard in folders]
    parts = [{**part, "path": f"{path}/{part['path']}"} for path, shard in shards for part in shard["parts"]]
    _write(folder, shards[0][1]["dimensions"], parts)


def _write(folder: Path, dimensions: int, parts: list[dict[str, Any]]) -> None:
    rows = sum(part["rows"] for part in parts)
    write_json(folder / DESCRIPTION, {"rows": rows, "dimensions": dimensions, "parts": parts})
