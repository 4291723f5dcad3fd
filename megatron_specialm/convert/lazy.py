"""Tensors that are read when they are indexed, and not before: what every format's reader gives and the driver takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


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


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed from others when it is read. Indexing computes all of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], torch.Tensor]

    def __getitem__(self, index: Any, /) -> torch.Tensor:
        return self.compute()[index]
