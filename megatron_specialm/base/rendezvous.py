"""The rendezvous of a run's ranks: a key-value store that all ranks reach, once all have arrived.

    SPECIALM_RENDEZVOUS_SECONDS=300    how long a rank waits for the others

torch's own rendezvous waits in C++, where it handles no signal, and does not say which ranks are missing. Here each wait is a
loop of short polls, so that Ctrl-C and SIGTERM take effect at once. The store lives as long as the process: all its process
groups, and ranks that wait for rank 0's work, use it. Torch is imported at the rendezvous, not before.
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
from megatron_specialm.base.printing import first_of
from megatron_specialm.base.protocol import LAUNCHER

if TYPE_CHECKING:
    from torch.distributed import Store

SECONDS = "SPECIALM_RENDEZVOUS_SECONDS"
DEFAULT_SECONDS = 300.0  # nodes that pull a container's image arrive minutes apart
LOG_SECONDS = 15.0  # between two lines that name the missing ranks
POLL_SECONDS = 0.1
ANSWER_SECONDS = 30.0  # for a store that has been reached
ARRIVED = "roll-call"
SHOWN_RANKS = 8

logger = logging.getLogger(__name__)


@functools.cache
def rendezvous(world: World) -> "Store":
    """The store that all ranks of a world share, once all have arrived. Every rank calls this.

    Raises:
        MachineError: naming the ranks that have not arrived in time; or the address cannot be used.
    """
    import torch.distributed as dist

    if world.world_size == 1:
        return dist.HashStore()
    wait = _Wait(world)
    try:
        store = _open_store(world, wait)
        _await_all(dist.PrefixStore(ARRIVED, store), world, wait)
    except SpecialmError:
        raise
    except (RuntimeError, ValueError) as error:  # RuntimeError: the base of torch's own
        raise MachineError(
            f"rank {world.rank} of {world.world_size} cannot meet the others at {rendezvous_address(world)}: {error}. "
            "If the port is in use, choose another (torchrun --master-port, or MASTER_PORT)"
        ) from None
    return store


def is_alive(world: World) -> bool:
    """Whether the process that hosts the store of a world is alive: rank 0, or torchrun's agent on its node."""
    with contextlib.suppress(RuntimeError):
        rendezvous(world).check([ARRIVED])
        return True
    return False


def wait_for_key(world: World, key: str) -> str:
    """The value that rank 0 sets for a key of the store. It may work for long before; the others wait while it is alive.

    Args:
        key: what has been done then, as a participle for the error, as "planned".

    Raises:
        TrainingError: rank 0 has ended without setting it.
    """
    store = rendezvous(world)
    while True:
        with contextlib.suppress(RuntimeError):  # the store is gone
            if store.check([key]):
                return store.get(key).decode()
        if not is_alive(world):
            raise TrainingError(f"rank 0 has ended and has not {key}: see its log")
        time.sleep(POLL_SECONDS)


def rendezvous_address(world: World) -> str:
    """The address of a rendezvous, for messages."""
    if world.init_method == "env://":
        return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return world.init_method


class _Wait:
    """A rank's wait for others: it logs for which, and has a limit."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._began = self._logged = time.monotonic()
        seconds = os.environ.get(SECONDS, str(DEFAULT_SECONDS))
        try:
            self._seconds = float(seconds)
        except ValueError:
            raise MachineError(f"{SECONDS}={seconds!r}: must be a number") from None

    def sleep(self, missing: Callable[[], str]) -> None:
        """Sleep until the next poll.

        Raises:
            MachineError: the limit is reached.
        """
        now = time.monotonic()
        rank = f"rank {self._world.rank} of {self._world.world_size} ({self._world.launcher})"
        if now - self._began > self._seconds:
            raise MachineError(
                f"{rank} has waited {self._seconds:g} s at {rendezvous_address(self._world)} for {missing()}: see whether they "
                f"run and reach that address. To run as one process, set {LAUNCHER}=none; to wait longer, "
                f"{SECONDS}"
            )
        if now - self._logged > LOG_SECONDS:
            self._logged = now
            logger.warning("%s waits at %s for %s", rank, rendezvous_address(self._world), missing())
        time.sleep(POLL_SECONDS)


def _open_store(world: World, wait: _Wait) -> "Store":
    import torch.distributed as dist

    if world.init_method.startswith("file://"):  # a path, not a URL: it may have a # or a %
        return dist.FileStore(world.init_method.removeprefix("file://"), world.world_size)
    address = urlsplit(f"tcp://{rendezvous_address(world)}" if world.init_method == "env://" else world.init_method)
    host, port = address.hostname, address.port
    if not host or port is None:
        raise MachineError(
            f"{rendezvous_address(world)}: not a host and a port: check the launcher's MASTER_ADDR, MASTER_PORT"
        )
    # torchrun's own process may host the store.
    agent_hosts = world.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = world.is_first and not agent_hosts
    while not hosts and not _accepts(host, port):
        wait.sleep(lambda: "rank 0, which has not opened it")
    return dist.TCPStore(
        host, port, world.world_size, is_master=hosts, wait_for_workers=False, multi_tenant=True,
        timeout=datetime.timedelta(seconds=ANSWER_SECONDS),
    )  # fmt: skip


def _accepts(host: str, port: int) -> bool:
    with contextlib.suppress(OSError, UnicodeError):  # not yet, or a name that does not resolve yet
        socket.create_connection((host, port), timeout=1).close()
        return True
    return False


def _await_all(arrived: "Store", world: World, wait: _Wait) -> None:
    if arrived.add(str(world.rank), 1) > 1:
        raise MachineError(f"two processes are rank {world.rank} of {world.world_size}: check the launcher's variables")
    arrived.add("come", 1)
    while arrived.add("come", 0) < world.world_size:
        wait.sleep(lambda: _missing(arrived, world.world_size))


def _missing(arrived: "Store", size: int) -> str:
    ranks = [rank for rank in range(size) if not arrived.check([str(rank)])]
    return f"rank{'s' if len(ranks) > 1 else ''} {first_of(ranks, SHOWN_RANKS)}"
