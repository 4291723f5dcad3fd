"""Collective operations of the processes that cluster together. All ranks get the same results."""

from typing import Protocol

import numpy as np

from megatron_specialm.base.errors import MachineError


class Ranks(Protocol):
    """The processes that cluster together. All of them call the same methods in the same order."""

    rank: int
    size: int

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over all ranks. Integer sums are exact and so do not depend on the number of ranks."""

    def largest(self, value: float) -> float:
        """The maximum over all ranks."""


class Alone:
    """A single process."""

    rank, size = 0, 1

    def total(self, values: np.ndarray) -> np.ndarray:
        return values

    def largest(self, value: float) -> float:
        return value


class MpiRanks:
    """The ranks of an MPI world."""

    def __init__(self) -> None:
        """Raises:
        MachineError: mpi4py cannot be used.
        """
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise MachineError(f"clustering over MPI ranks needs mpi4py ({error}): pip install mpi4py") from None
        self._world, self._largest = MPI.COMM_WORLD, MPI.MAX
        self.rank, self.size = self._world.rank, self._world.size

    def total(self, values: np.ndarray) -> np.ndarray:
        everything = np.empty_like(values)
        self._world.Allreduce(np.ascontiguousarray(values), everything)
        return everything

    def largest(self, value: float) -> float:
        return float(self._world.allreduce(value, op=self._largest))
