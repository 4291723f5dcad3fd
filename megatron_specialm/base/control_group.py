"""What the processes of a training agree on beside gradients: over gloo, so that it works next to NCCL and in threads."""

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
    def meet(cls) -> "ControlGroup":
        """A line of its own between all processes; all call this at once. Each thread that talks needs one."""
        return cls(dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None)

    @property
    def rank(self) -> int:
        """This process's number."""
        return self._group.rank() if self._group else 0

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def tell_all(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks. Nobody goes on before all have come here."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._group.size()
        dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, make: Callable[[], T]) -> list[T]:
        """What `make` returns on each process; where it fails on any, all of them fail with the first error."""
        outcomes = self.tell_all(_outcome(make))
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def begin_any(self, flag: bool) -> Callable[[], bool]:
        """Ask whether anybody's flag is raised. What comes back waits for the answer, which is the same for all."""
        if self._group is None:
            return lambda: flag
        raised = torch.tensor([flag], dtype=torch.uint8)
        asking = dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert asking is not None

        def answer() -> bool:
            asking.wait()
            return bool(raised.item())

        return answer

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first process; its error, if it fails, is everybody's."""
        return self.agree(lambda: make() if self.is_first else None)[0]  # type: ignore[return-value]

    def limit_collectives(self, seconds: float) -> None:
        """From here on, let a collective fail that takes longer."""
        if self._group is not None:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), self._group)


class StopFlag:
    """A flag that anybody may raise and all hear of at the same call: at once where they hear it at the first call, else at
    the call after. So the answer has a step's time to come, and nobody waits for it."""

    def __init__(self, peers: ControlGroup) -> None:
        self._peers = peers
        self._asked: Callable[[], bool] | None = None

    def poll(self, raised: bool) -> bool:
        """Whether it was raised; all call this equally often."""
        if self._asked is None:
            self._asked = self._peers.begin_any(raised)
            return self._asked()
        heard = self._asked()
        self._asked = self._peers.begin_any(raised)
        return heard


def _outcome(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return make(), None
    except (SpecialmError, OSError) as error:
        return None, error


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether torch.distributed complains of a process that does not answer any more."""
    words = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "Timed out", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
