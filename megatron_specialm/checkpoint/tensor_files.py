"""Tensors in safetensors files, whole or in slices that processes have written; read whole or in slices. torch is
imported when a tensor is read as torch's, not before."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import REMAKE, reading
from megatron_specialm.checkpoint.slices import StoredSlice, check_slices, parse_key

_FORM = "a file of tensors"


class StoredTensor:
    """A tensor in files. Indexed with a tuple of slices, it reads that box: from a memory map where one stored slice has all of
    it, else assembled from those that have a part."""

    def __init__(self, files: Mapping[Path, Any], slices: list[StoredSlice], *, remedy: str) -> None:
        self._files, self._slices, self._remedy = files, slices, remedy
        self.shape = slices[0].shape

    @property
    def dtype(self) -> Any:
        """The type of its elements."""
        first = self._slices[0]
        return self._read(first, [(start, start) for start in first.starts]).dtype

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        return read_box(index, self._slices, self._read)

    def _read(self, stored: StoredSlice, bounds: list[tuple[int, int]]) -> Any:
        file = self._files[stored.path]
        with reading(stored.path, form=_FORM, remedy=self._remedy):
            if bounds == list(zip(stored.starts, stored.stops, strict=True)):
                return file.get_tensor(stored.key)
            own = (slice(a - first, b - first) for (a, b), first in zip(bounds, stored.starts, strict=True))
            return file.get_slice(stored.key)[tuple(own)]


Bounds = list[tuple[int, int]]


def read_box(index: tuple[slice, ...], slices: list[StoredSlice], read: Callable[[StoredSlice, Bounds], Any]) -> Any:
    """The box of a tensor at a tuple of slices, which `read` gets from the stored ones that have a part of it; None if it is
    empty and there are several stored ones.

    Args:
        read: the content of a stored slice between first and end per dimension, counted in the tensor.
    """
    shape = slices[0].shape
    index += (slice(None),) * (len(shape) - len(index))
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    if len(slices) == 1:
        return read(slices[0], bounds)
    box = None
    for stored in slices:
        shared = [
            (max(start, first), min(stop, end))
            for (start, stop), first, end in zip(bounds, stored.starts, stored.stops, strict=True)
        ]
        if any(start >= stop for start, stop in shared):
            continue
        part = read(stored, shared)
        if shared == bounds:
            return part
        if box is None:
            sizes = [stop - start for start, stop in bounds]
            box = np.empty(sizes, part.dtype) if isinstance(part, np.ndarray) else part.new_empty(sizes)
        box[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(shared, bounds, strict=True))] = part
    return box


class _Stored(dict[str, StoredTensor]):
    """The tensors of files by name; to ask for a missing one is a `CheckpointError`."""

    def __init__(self, folders: str, tensors: Mapping[str, StoredTensor]) -> None:
        super().__init__(tensors)
        self._folders = folders

    def __missing__(self, name: str) -> StoredTensor:
        raise CheckpointError(f"{self._folders}: has no tensor {name}: it is of another model")


class TensorFiles(Mapping[str, Any]):
    """The tensors of several safetensors files by name, each read whole when it is asked for: torch's, or NumPy's arrays.
    `stored` has the same ones to read slices of.

    Args:
        remedy: what to do if a file is damaged.

    Raises:
        ArtifactError: a file is missing or damaged.
        CheckpointError: an element of a tensor is in no slice, or in two; or a tensor is asked for that no file has.
    """

    def __init__(self, paths: Iterable[Path], *, framework: Literal["pt", "np"] = "pt", remedy: str = REMAKE) -> None:
        files: dict[Path, Any] = {}
        found: dict[str, list[StoredSlice]] = {}
        for path in paths:
            with reading(path, form=_FORM, remedy=remedy):
                files[path] = file = safe_open(path, framework=framework)
                for key in file.keys():  # noqa: SIM118 (it is no mapping)
                    name, stored = parse_key(path, key, file.get_slice(key).get_shape(), remedy=remedy)
                    found.setdefault(name, []).append(stored)
        for name, slices in found.items():
            check_slices(name, slices, remedy=remedy)
        folders = ", ".join(sorted({str(path.parent) for path in files})) or "no file"
        tensors = {name: StoredTensor(files, slices, remedy=remedy) for name, slices in found.items()}
        self.stored = _Stored(folders, tensors)

    def __getitem__(self, name: str) -> Any:
        return self.stored[name][()]

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)
