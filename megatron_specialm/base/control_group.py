"""Collectives of Python objects between the processes of a training, over gloo, which works beside NCCL and in threads."""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_specialm.base.errors import SpecialmError

T = TypeVar("T")


class ControlGroup:
    """All processes of a training, or this one alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @classmethod
    def open(cls) -> "ControlGroup":
        """A new group of all processes, each of which calls this. Every thread that communicates needs a group of its own."""
        return cls(dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None)

    @property
    def rank(self) -> int:
        return self._group.rank() if self._group else 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Gather the values of all processes, in the order of ranks. It is a barrier, too."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._group.size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, make: Callable[[], T]) -> list[T]:
        """Gather what `make` returns on each process; where it raises on any, all raise the error of the lowest rank."""
        outcomes = self.all_gather(_outcome(make))
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        """Begin a logical or of all flags. The function that is returned waits for the result, which is the same for all."""
        if self._group is None:
            return lambda: flag
        raised = torch.tensor([flag], dtype=torch.uint8)
        work = dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None

        def answer() -> bool:
            work.wait()
            return bool(raised.item())

        return answer

    def broadcast(self, make: Callable[[], T]) -> T:
        """Broadcast what `make` returns on rank 0; where it raises there, all raise the error."""
        return self.agree(lambda: make() if self.is_first else None)[0]  # type: ignore[return-value]

    def limit_collectives(self, seconds: float) -> None:
        """From here on, let a collective fail that takes longer."""
        if self._group is not None:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), self._group)


class StopFlag:
    """A flag that any process may raise, and that all see at the same call: at the first call at once, later one call after. So
    the all-reduce has the time of a step, and no process waits for it."""

    def __init__(self, control: ControlGroup) -> None:
        self._control = control
        self._result: Callable[[], bool] | None = None

    def poll(self, raised: bool) -> bool:
        """Whether any process has raised it. All processes call this equally often."""
        if self._result is None:
            self._result = self._control.begin_any(raised)
            return self._result()
        result = self._result()
        self._result = self._control.begin_any(raised)
        return result


def _outcome(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except (SpecialmError, OSError) as error:
        return None, error


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed means that another process has ended."""
    signs = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "Timed out", "NCCL")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
