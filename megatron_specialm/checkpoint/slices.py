"""Slices of canonical tensors: the keys that files name them by, and the check that those of all files make whole tensors.

A process writes the boxes of each tensor that it owns. A box's key has the tensor's name, and per dimension first index, end
and global size: `mlp.linear_fc1.weight[64:128/256,0:32/32]` is rows 64 to 127 of a (256, 32) tensor. So the header of each
file says all about it. A whole tensor is under its plain name, which is all that checkpoints of earlier versions have.
"""

import bisect
import math
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import REMAKE

_KEY = re.compile(r"(?P<name>.+)\[(?P<box>\d+:\d+/\d+(?:,\d+:\d+/\d+)*)\]")


class SavedTensors(NamedTuple):
    """What a process writes of a step: weights and the optimizer's state, by the keys of their slices."""

    weights: Mapping[str, torch.Tensor]
    optimizer_state: Mapping[str, torch.Tensor]


class StoredSlice(NamedTuple):
    """A box of a tensor in a file: indices `starts` to `stops` (exclusive) of a tensor of the global `shape`."""

    path: Path
    key: str
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(stop - start for start, stop in zip(self.starts, self.stops, strict=True))


def slice_key(name: str, index: tuple[slice, ...], shape: Sequence[int]) -> str:
    """The key of a box of a canonical tensor; of the whole tensor, its name.

    Args:
        index: a slice with start and stop for each dimension.
        shape: of the whole tensor.
    """
    if all(part == slice(0, size) for part, size in zip(index, shape, strict=True)):
        return name
    box = ",".join(f"{part.start}:{part.stop}/{size}" for part, size in zip(index, shape, strict=True))
    return f"{name}[{box}]"


def parse_key(path: Path, key: str, shape: Sequence[int], *, remedy: str = REMAKE) -> tuple[str, StoredSlice]:
    """The name of the tensor that a key in a file is of, and the box that it is.

    Args:
        shape: of what stands under the key.

    Raises:
        CheckpointError: the key says another shape, or no box of a tensor.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return key, StoredSlice(path, key, (0,) * len(shape), tuple(shape), tuple(shape))
    starts, stops, sizes = zip(*(map(int, re.split("[:/]", part)) for part in match["box"].split(",")), strict=True)
    inside = all(0 <= start < stop <= size for start, stop, size in zip(starts, stops, sizes, strict=True))
    if not inside or tuple(shape) != tuple(stop - start for start, stop in zip(starts, stops, strict=True)):
        raise CheckpointError(f"{path}: {key} has shape {tuple(shape)}, which is not that of this slice: {remedy}")
    return match["name"], StoredSlice(path, key, starts, stops, sizes)


def check_slices(name: str, slices: Sequence[StoredSlice], *, remedy: str = REMAKE) -> None:
    """Check that every element of a tensor is in exactly one slice.

    Raises:
        CheckpointError: naming the tensor and a file: slices are of different shapes, overlap, or leave elements out.
    """
    first = slices[0]
    for other in slices:
        if other.shape != first.shape:
            raise CheckpointError(
                f"{other.path}: {name} has shape {other.shape}, and {first.shape} in {first.path}: {remedy}"
            )
    # In order of their first rows, a slice can overlap only those behind it that begin before it ends: of the slices of many
    # data-parallel ranks these are few, where all pairs would be millions.
    ordered = sorted(slices, key=lambda one: one.starts)
    first_rows = [one.starts[:1] for one in ordered]
    for number, one in enumerate(ordered):
        end = bisect.bisect_left(first_rows, one.stops[:1]) if one.shape else len(ordered)
        for other in ordered[number + 1 : end]:
            if all(map(operator.lt, other.starts, one.stops)) and all(map(operator.lt, one.starts, other.stops)):
                raise CheckpointError(
                    f"{other.path}: has {other.key}, which {one.path} has too, as {one.key}: {remedy}"
                )
    held, all_elements = sum(one.elements for one in slices), math.prod(first.shape)
    if held != all_elements:
        files = sorted({str(one.path) for one in slices})
        more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        covered = {index for one in slices if one.shape for index in range(one.starts[0], one.stops[0])}
        empty = next((index for index in range(first.shape[0] if first.shape else 0) if index not in covered), None)
        none = "" if empty is None else f", none at index {empty}"  # of a weight of experts, the expert
        raise CheckpointError(
            f"{files[0]}{more}: the slices of {name} have {held} of its {all_elements} elements{none}: {remedy}"
        )
