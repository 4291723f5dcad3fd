"""The rank, world size and rendezvous address of this process, from its launcher's environment variables.

Only this module reads the variables of torchrun, srun and mpirun. It does not import torch.

The variables of several launchers may be set at once. If PMIx is a cluster's default, `srun` sets PMIx's variables for every
program, so Slurm's have precedence. `mpirun` in a Slurm job leaves the Slurm variables of its own daemons, so Open MPI's have
precedence over those. SPECIALM_LAUNCHER=srun|torchrun|mpi|none overrides this, as for `srun --mpi=pmix`, which is ambiguous.

Every shell in a Slurm job has the job's variables, and children inherit those of a launcher. So Slurm's variables count only in
a step that srun has started, with the step's number of tasks. A step with one task is a single process.
"""

import getpass
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.protocol import LAUNCHER


@dataclass(frozen=True)
class World:
    """rank of world_size; local_rank picks the device on this node; init_method is torch.distributed's address."""

    rank: int
    world_size: int
    local_rank: int
    init_method: str
    launcher: str

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which plans, writes artifacts and logs."""
        return self.rank == 0

    @property
    def is_mpi(self) -> bool:
        """Whether the ranks communicate by MPI."""
        return self.launcher == "mpirun"


ALONE = World(rank=0, world_size=1, local_rank=0, init_method="", launcher="none")
SPECIAL_STEPS = 0xFFFFFFF0  # from here on step ids are reserved by Slurm: batch, interactive (salloc's shell), extern


def discover_world(environ: Mapping[str, str] = os.environ) -> World:
    """Read the launcher's variables.

    Raises:
        MachineError: the variables contradict each other, or MPI is used without mpi4py.
    """
    launcher = environ.get(LAUNCHER) or _launcher(environ)
    if launcher == "none":
        return ALONE
    read = {"torchrun": _torchrun_world, "srun": _slurm_world, "mpi": _mpi_world}
    if launcher not in read:
        raise MachineError(f"{LAUNCHER}={launcher!r}: must be one of {', '.join(read)}, none")
    return read[launcher](environ)


def _launcher(environ: Mapping[str, str]) -> str:
    """The launcher whose variables count. Slurm and MPI do not count with a single process."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return "torchrun"
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return "none" if environ["OMPI_COMM_WORLD_SIZE"] == "1" else "mpi"
    step = environ.get("SLURM_STEP_ID", "")
    in_step = step.isdecimal() and "SLURM_PROCID" in environ
    if in_step and int(step) < SPECIAL_STEPS and _tasks_of_step(environ) != 1:
        return "srun"
    if environ.get("PMI_SIZE", "1") != "1":  # MPICH's and Intel MPI's mpirun
        return "mpi"
    return "mpi" if "PMIX_RANK" in environ and not in_step else "none"


def user_name() -> str:
    """The user's name for records; in a container the user may have none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # depends on the version of Python
        return f"uid {os.getuid()}"


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def node_name() -> str:
    """This node's name in Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _checked(world: World) -> World:
    if not 0 <= world.rank < world.world_size:
        raise MachineError(
            f"RANK {world.rank} is not below WORLD_SIZE {world.world_size}: check the launcher's variables"
        )
    return world


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise MachineError(f"{name}={environ.get(name)!r}: must be a whole number; it is set by the launcher") from None


def _torchrun_world(environ: Mapping[str, str]) -> World:
    rank, size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    local = _integer(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else rank
    if size > 1 and ("MASTER_ADDR" not in environ or "MASTER_PORT" not in environ):
        raise MachineError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not: launch with torchrun")
    return _checked(World(rank, size, local, "env://", "torchrun"))


def _slurm_world(environ: Mapping[str, str]) -> World:
    """The world under `srun`. The rendezvous is on the first node, at a port derived from the job's id."""
    size = _tasks_of_step(environ)
    host = environ.get("MASTER_ADDR") or first_slurm_host(environ.get("SLURM_STEP_NODELIST", ""))
    port = environ.get("MASTER_PORT") or str(20_000 + _integer(environ, "SLURM_JOB_ID") % 20_000)
    return _checked(
        World(
            _integer(environ, "SLURM_PROCID"), size, _integer(environ, "SLURM_LOCALID"), f"tcp://{host}:{port}", "srun"
        )
    )


def _tasks_of_step(environ: Mapping[str, str]) -> int:
    """The step's number of tasks; SLURM_NTASKS may be the job's."""
    return _integer(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")


def first_slurm_host(nodelist: str) -> str:
    """The first node of a Slurm node list: `gpu[003-007,9],cpu1` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?", nodelist)
    if match is None:
        raise MachineError(f"SLURM_STEP_NODELIST={nodelist!r}: not a node list")
    return match.group(1) + (match.group(2) or "")


def _mpi_world(environ: Mapping[str, str]) -> World:
    """The world under `mpirun` or `srun --mpi`. Rank 0 chooses the rendezvous address and broadcasts it by MPI. In a Slurm job
    the host is MASTER_ADDR, because node names need not resolve."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise MachineError(
            f"started as ranks of MPI, but mpi4py cannot be used ({error}): pip install 'megatron_specialm[mpi]'"
        ) from None
    communicator = MPI.COMM_WORLD
    address = None
    if communicator.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = environ.get("MASTER_PORT") or str(probe.getsockname()[1])
        address = f"tcp://{environ.get('MASTER_ADDR') or socket.gethostname()}:{port}"
    local = communicator.Split_type(MPI.COMM_TYPE_SHARED).rank
    return World(communicator.rank, communicator.size, local, communicator.bcast(address), "mpirun")


def choose_gloo_interface(address: str) -> None:
    """Set gloo's network interface to the one that reaches the rendezvous. By default gloo uses the interface of this host's
    name, which is the loopback if the name does not resolve."""
    import psutil

    host = os.environ.get("MASTER_ADDR") if address == "env://" else urlsplit(address).hostname
    if not host or "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(socket.gethostname()) or _is_loopback(host):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((host, 9))
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own in {entry.address for entry in addresses}:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _is_loopback(host: str) -> bool:
    """Whether a name resolves to the loopback, or does not resolve."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except (OSError, UnicodeError):  # UnicodeError: the text cannot be a host name
        return True
