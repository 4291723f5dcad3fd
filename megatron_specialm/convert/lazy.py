"""Tensors that are read when they are indexed, and not before: what every format's reader gives and the driver takes."""

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.safe_pickle import COPY_AGAIN

COMPARED_ELEMENTS = 2**24  # of a copy, that are in memory at a time


class LazyTensor(Protocol):
    """A tensor in files. Indexed with a tuple of slices, it reads that box; with `()`, all of it."""

    @property
    def shape(self) -> Sequence[int]:
        """The shape of the full tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements in the files."""

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        """The box at a tuple of slices."""


@dataclass(frozen=True, eq=False)
class Computed:
    """A tensor that is computed from others when it is read, as a whole. The last one of a thread is kept: writers ask for one
    slice after another."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], torch.Tensor]

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        if getattr(_last, "owner", None) is not self:
            _last.owner = _last.tensor = None  # frees it first
            tensor = self.compute()
            _last.owner, _last.tensor = self, tensor
        return _last.tensor[index]


_last = threading.local()


@dataclass(frozen=True, eq=False)
class Sliced:
    """A tensor each box of which is found by a function of the slices, one for each dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[tuple[slice, ...]], torch.Tensor]

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        given = index if isinstance(index, tuple) else (index,)
        whole = (*given, *[slice(None)] * (len(self.shape) - len(given)))
        bounds = (part.indices(size)[:2] for part, size in zip(whole, self.shape, strict=True))
        return self.read(tuple(slice(*pair) for pair in bounds))


def cast(tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """A tensor in another type."""
    if tensor.dtype == dtype:
        return tensor
    return Sliced(tuple(tensor.shape), dtype, lambda index: tensor[index].to(dtype))


def part(tensor: LazyTensor, number: int) -> LazyTensor:
    """One index of the first dimension: of all layers, one."""
    return Sliced(tuple(tensor.shape[1:]), tensor.dtype, lambda index: tensor[(slice(number, number + 1), *index)][0])


def equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits: NaN is equal to itself."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def agreed(copies: Mapping[str, LazyTensor], name: str, where: Path) -> LazyTensor:
    """A tensor that several ranks hold whole. The copies are compared when it is read, some rows at a time.

    Args:
        copies: by their ranks, for messages.
        name: of the tensor, and `where` it is, for messages.

    Raises:
        CheckpointError: copies differ.
    """
    (own, first), *others = copies.items()
    if not others:
        return first
    step = max(1, COMPARED_ELEMENTS // max(1, math.prod(first.shape[1:])))

    def read(index: tuple[slice, ...]) -> torch.Tensor:
        box = first[index]
        rows = range(0, len(box), step) if index else [0]
        for (rank, other), row in product(others, rows):
            part, place = (box, index) if not index else (box[row : row + step], _rows(index, row, step))
            if tuple(other.shape) != tuple(first.shape) or not equal_bits(part, other[place]):
                raise CheckpointError(
                    f"{where}: {name} differs between {own} and {rank}, which must hold the same: one file is of another "
                    f"checkpoint, or damaged: {COPY_AGAIN}"
                )
        return box

    return Sliced(tuple(first.shape), first.dtype, read)


def _rows(index: tuple[slice, ...], row: int, count: int) -> tuple[slice, ...]:
    """The slices of `count` rows of a box, from `row` on."""
    first = index[0].start + row
    return (slice(first, min(first + count, index[0].stop)), *index[1:])


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """A tensor of zeros."""
    return Computed(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def row_range(tensor: LazyTensor, first: int, stop: int) -> LazyTensor:
    """Some rows of a tensor."""
    return Sliced(
        (stop - first, *tensor.shape[1:]),
        tensor.dtype,
        lambda index: tensor[(slice(first + index[0].start, first + index[0].stop), *index[1:])],
    )


def filled(parts: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """So many tensors of one shape along a new first dimension; one of them at a time is in memory beside the result."""
    whole = torch.empty(0)
    for number, part in enumerate(parts):
        if not number:
            whole = torch.empty(count, *part.shape, dtype=part.dtype)
        whole[number] = part
    return whole


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors of one shape along a new first dimension."""
    shape = (len(parts), *parts[0].shape)

    def read(index: tuple[slice, ...]) -> torch.Tensor:
        own = parts[index[0]]
        return filled((one[index[1:]] for one in own), len(own))

    return Sliced(shape, parts[0].dtype, read)


def with_rows(tensor: LazyTensor, rows: int) -> LazyTensor:
    """A tensor with another number of rows: the last are left out, or rows of zeros are added."""

    def read(index: tuple[slice, ...]) -> torch.Tensor:
        own = slice(min(index[0].start, tensor.shape[0]), min(index[0].stop, tensor.shape[0]))
        found = tensor[(own, *index[1:])]
        missing = index[0].stop - index[0].start - found.shape[0]
        return torch.cat([found, found.new_zeros(missing, *found.shape[1:])]) if missing else found

    return Sliced((rows, *tensor.shape[1:]), tensor.dtype, read)
