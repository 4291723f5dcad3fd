"""Tensors in files of other programs, of which only the slices that are asked for are read.

Each has `shape`, `dtype` and, as `model.weights.Sliceable`, gives the box at a tuple of slices (without steps) as a new tensor.
"""

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.checkpoint.slices import StoredSlice, check_slices
from megatron_specialm.checkpoint.tensor_files import Bounds, read_box
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.safe_pickle import COPY_AGAIN, decoding

_BITS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}


@dataclass(frozen=True)
class FileTensor:
    """A strided tensor at a byte offset of a file. The file is mapped while a slice is copied, and no longer."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)[index]
        size = self.dtype.itemsize
        page = self.start % mmap.ALLOCATIONGRANULARITY
        with decoding(self.path, "a checkpoint"), self.path.open("rb") as file:
            length = page + size * (1 + last_element(self.shape, self.stride))
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=self.start - page) as mapped:
                strides = [size * step for step in self.stride]
                whole = np.ndarray(self.shape, _BITS[size], mapped, page, strides)  # of any alignment
                box = np.array(whole[index], order="C")
                del whole  # or the map cannot be closed
        return torch.from_numpy(box).view(self.dtype)


def last_element(shape: Sequence[int], stride: Sequence[int]) -> int:
    """The place of a tensor's last element, in elements from its first."""
    return sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


class BoxedTensor:
    """A tensor in boxes, by the slice that each is.

    Raises:
        CheckpointError: an element is in no box, or in two.
    """

    def __init__(self, name: str, boxes: Mapping[StoredSlice, LazyTensor]) -> None:
        self._slices, self._boxes = list(boxes), boxes
        check_slices(name, self._slices, remedy=COPY_AGAIN)
        self.shape, self.dtype = self._slices[0].shape, boxes[self._slices[0]].dtype

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        box = read_box(index, self._slices, self._read)
        return torch.empty(self.shape, dtype=self.dtype)[index] if box is None else box

    def _read(self, stored: StoredSlice, bounds: Bounds) -> torch.Tensor:
        own = (slice(a - first, b - first) for (a, b), first in zip(bounds, stored.starts, strict=True))
        return self._boxes[stored][tuple(own)]


@dataclass(frozen=True)
class Run:
    """Elements of a flattened tensor: the first one's place, and a flat tensor that has them from `start` on."""

    first: int
    count: int
    content: FileTensor
    start: int


class FlatTensor:
    """A tensor whose flattened elements are in runs, as ZeRO partitions them. The rows that a slice needs are read.

    Raises:
        CheckpointError: an element is in no run, or in two.
    """

    def __init__(self, name: str, shape: tuple[int, ...], runs: Sequence[Run], path: Path) -> None:
        self.shape, self._runs = shape, sorted((run for run in runs if run.count), key=lambda run: run.first)
        self.dtype = runs[0].content.dtype
        end = 0
        for run in self._runs:
            if run.first != end or run.start < 0 or run.start + run.count > run.content.shape[0]:
                raise CheckpointError(
                    f"{path}: {name}: element {end} is not where it should be: the file of a rank is missing or damaged"
                )
            end += run.count
        if end != math.prod(shape):
            raise CheckpointError(
                f"{path}: {name}: has {end} of {math.prod(shape)} elements: the file of a rank is missing or damaged"
            )

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        bounds = bounds_of(index, self.shape)
        row = math.prod(self.shape[1:])
        first, last = (bounds[0][0] * row, bounds[0][1] * row) if bounds else (0, 1)
        parts = list(self._between(first, max(first, last)))
        flat = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype)
        if not bounds:
            return flat.view(())
        rows = flat.view(max(0, bounds[0][1] - bounds[0][0]), *self.shape[1:])
        box = rows[(slice(None), *(slice(*part) for part in bounds[1:]))]
        return box if box.is_contiguous() else box.contiguous()

    def _between(self, first: int, last: int) -> Iterator[torch.Tensor]:
        for run in self._runs:
            start, stop = max(first, run.first), min(last, run.first + run.count)
            if start < stop:
                offset = run.start - run.first
                yield run.content[slice(start + offset, stop + offset),]


def bounds_of(index: tuple[slice, ...], shape: Sequence[int]) -> Bounds:
    """First and end of each dimension's slice; dimensions that the index does not mention are whole."""
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
