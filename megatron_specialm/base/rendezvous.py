"""Where the ranks of a run meet: a store of keys that all of them reach, and the roll call that says who is missing.

    SPECIALM_MEETING_SECONDS=300    how long a rank waits for the others

torch's own rendezvous waits in C++: it hears no signal and names nobody. Here each wait is a loop of short looks, so that
Ctrl-C and SIGTERM count at once. The store lives as long as the process: every process group of it, and the ranks that wait
for the first one's work, use the same. Torch is imported when ranks meet, not before.
"""

import contextlib
import datetime
import functools
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import MachineError, SpecialmError, TrainingError

if TYPE_CHECKING:
    from torch.distributed import Store

MEETING_SECONDS = 300.0  # nodes that pull a container's image come minutes apart
TELL_SECONDS = 15.0  # between two lines that say for whom we wait
LOOK_SECONDS = 0.1
ANSWER_SECONDS = 30.0  # for a store that has been reached
SHOWN_RANKS = 8

logger = logging.getLogger(__name__)


@functools.cache
def meet(world: World) -> "Store":
    """The store that all ranks of a world share, once all of them have come. To be called by every rank.

    Raises:
        MachineError: naming the ranks that have not come in time; or the meeting point cannot be used.
    """
    import torch.distributed as dist

    if world.world_size == 1:
        return dist.HashStore()
    patience = _Patience(world)
    try:
        store = _open_store(world, patience)
        _call_roll(dist.PrefixStore("roll-call", store), world, patience)
    except SpecialmError:
        raise
    except (RuntimeError, ValueError) as error:  # RuntimeError: the base of torch's own
        raise MachineError(
            f"rank {world.rank} of {world.world_size} cannot meet the others at {meeting_point(world)}: {error}. "
            "If the port is in use, choose another (torchrun --master-port, or MASTER_PORT)"
        ) from None
    return store


def is_alive(world: World) -> bool:
    """Whether the process that keeps the store of a world is still there: the first rank, or torchrun's agent on its node."""
    with contextlib.suppress(RuntimeError):
        meet(world).check(["roll-call"])
        return True
    return False


def await_word(world: World, key: str) -> str:
    """What the first rank says under a key of the store. It may be at work for long before; the others wait for as long as it
    lives.

    Args:
        key: says what has been done then, for the error.

    Raises:
        TrainingError: it has ended without a word.
    """
    store = meet(world)
    while True:
        with contextlib.suppress(RuntimeError):  # the store is gone
            if store.check([key]):
                return store.get(key).decode()
        if not is_alive(world):
            raise TrainingError(f"rank 0 has ended and has not {key}: see what it said")
        time.sleep(LOOK_SECONDS)


def meeting_point(world: World) -> str:
    """For messages."""
    if world.init_method == "env://":
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return world.init_method


class _Patience:
    """One wait of a rank for others: it tells for whom, and ends."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._began = self._told = time.monotonic()
        seconds = os.environ.get("SPECIALM_MEETING_SECONDS", str(MEETING_SECONDS))
        try:
            self._seconds = float(seconds)
        except ValueError:
            raise MachineError(f"SPECIALM_MEETING_SECONDS={seconds!r}: must be a number") from None

    def look_again(self, missing: Callable[[], str]) -> None:
        """Sleep until the next look.

        Raises:
            MachineError: the time is over.
        """
        now = time.monotonic()
        who = f"rank {self._world.rank} of {self._world.world_size} ({self._world.launcher})"
        if now - self._began > self._seconds:
            raise MachineError(
                f"{who} has waited {self._seconds:g} s at {meeting_point(self._world)} for {missing()}: see whether they run "
                "and reach that address. To run as one process, set SPECIALM_LAUNCHER=none; to wait longer, "
                "SPECIALM_MEETING_SECONDS"
            )
        if now - self._told > TELL_SECONDS:
            self._told = now
            logger.warning("%s waits at %s for %s", who, meeting_point(self._world), missing())
        time.sleep(LOOK_SECONDS)


def _open_store(world: World, patience: _Patience) -> "Store":
    import torch.distributed as dist

    if world.init_method.startswith("file://"):  # a path, not a URL: it may have a # or a %
        return dist.FileStore(world.init_method.removeprefix("file://"), world.world_size)
    address = urlsplit(f"tcp://{meeting_point(world)}" if world.init_method == "env://" else world.init_method)
    host, port = address.hostname, address.port
    if not host or port is None:
        raise MachineError(
            f"{meeting_point(world)}: not a host and a port: check the launcher's MASTER_ADDR, MASTER_PORT"
        )
    keeps = world.is_first and not _agent_keeps_store(world)
    while not keeps and not _listens(host, port):
        patience.look_again(lambda: "rank 0, which has not opened it")
    return dist.TCPStore(
        host, port, world.world_size, is_master=keeps, wait_for_workers=False, multi_tenant=True,
        timeout=datetime.timedelta(seconds=ANSWER_SECONDS),
    )  # fmt: skip


def _agent_keeps_store(world: World) -> bool:
    """Whether torchrun's own process keeps the store."""
    return world.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError, UnicodeError):  # not yet, or a name that does not resolve yet
        socket.create_connection((host, port), timeout=1).close()
        return True
    return False


def _call_roll(roll: "Store", world: World, patience: _Patience) -> None:
    if roll.add(str(world.rank), 1) > 1:
        raise MachineError(f"two processes are rank {world.rank} of {world.world_size}: check the launcher's variables")
    roll.add("come", 1)
    while roll.add("come", 0) < world.world_size:
        patience.look_again(lambda: _absent(roll, world.world_size))


def _absent(roll: "Store", size: int) -> str:
    ranks = [rank for rank in range(size) if not roll.check([str(rank)])]
    rest = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:SHOWN_RANKS]))}{rest}"
