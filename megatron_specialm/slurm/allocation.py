"""The allocation of a job's attempt, and the commands that start processes in it: ranks by srun alone, by torchrun on each
node, or by MPI through PMIx; or one process per node."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.errors import MachineError
from megatron_specialm.config.site import Container, Launcher
from megatron_specialm.slurm.commands import slurm
from megatron_specialm.slurm.sbatch import JobSize


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave to this attempt.

    `job`: Slurm's name of the array's element, as 123_0. (The last element of an array has the array's own id as SLURM_JOB_ID,
    and a scontrol of that acts on all elements.) `attempt` counts from 0. `address`: the first node's address as Slurm itself
    uses it, because names of nodes need not resolve.
    """

    job: str
    element: int | None
    attempt: int
    nodes: tuple[str, ...]
    address: str
    cpus_per_task: int
    gpus_per_node: int


def read_allocation(environ: Mapping[str, str] = os.environ) -> Allocation:
    """The allocation around this process, which is the batch step on the first node.

    Raises:
        MachineError: there is none, or Slurm does not answer.
    """
    if "SLURM_JOB_ID" not in environ:
        raise MachineError(
            "SLURM_JOB_ID is not set: `specialm supervise` runs inside a job, `specialm submit` makes one"
        )
    array, element = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    nodes = tuple(slurm("scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]).split())
    return Allocation(
        job=f"{array}_{element}" if array else environ["SLURM_JOB_ID"],
        element=int(element) if array and element else None,
        attempt=int(environ.get("SLURM_RESTART_COUNT", "0")),
        nodes=nodes,
        address=_address(nodes[0]),
        cpus_per_task=int(environ.get("SLURM_CPUS_PER_TASK", "1")),
        gpus_per_node=int(environ.get("SLURM_GPUS_ON_NODE", "0")),
    )


def _address(node: str) -> str:
    found = re.search(r"NodeAddr=(\S+)", slurm("scontrol", "show", "node", node))
    return found.group(1) if found else node


def rank_command(
    command: Sequence[str], *, launcher: Launcher, size: JobSize, allocation: Allocation, port: int,
    container: Container | None, folder: Path,
) -> list[str]:  # fmt: skip
    """The command line that starts a task's ranks.

    Args:
        command: what each rank runs; its first word is a Python interpreter.
        port: a free one on the first node, for the rendezvous of torchrun.
        folder: the working directory of the ranks, also in a container.
    """
    if launcher == "torchrun":
        agent = [
            command[0], "-m", "torch.distributed.run", f"--nnodes={size.nodes}", f"--nproc-per-node={size.ranks_per_node}",
            f"--master-addr={allocation.address}", f"--master-port={port}", "--no-python",
        ]  # fmt: skip
        # A node's number is known on the node only; torchrun reads it from PET_NODE_RANK.
        numbered = ["bash", "-c", 'PET_NODE_RANK=$SLURM_NODEID exec "$@"', "torchrun"]
        step = _step_on_nodes(size, allocation, container, folder)
        return [*step, *numbered, *_apptainer(container, folder), *agent, *command]
    step = _step(size, cpus=allocation.cpus_per_task, mpi="pmix" if launcher == "mpi" else "none")
    return [*step, *_pyxis(container, folder), *_apptainer(container, folder), *command]


def node_command(
    command: Sequence[str], *, size: JobSize, allocation: Allocation, container: Container | None, folder: Path
) -> list[str]:
    """The command line that runs a command once on each node of `size`, as its ranks would run, with all their CPUs."""
    return [*_step_on_nodes(size, allocation, container, folder), *_apptainer(container, folder), *command]


def probe_command(node: str) -> list[str]:
    """The command line that starts a process on one node of the allocation, which does nothing there."""
    return [
        "srun", "--overlap", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", f"--nodelist={node}", "--mpi=none", "true",
    ]  # fmt: skip


def _step_on_nodes(size: JobSize, allocation: Allocation, container: Container | None, folder: Path) -> list[str]:
    step = _step(JobSize(size.nodes, 1), cpus=allocation.cpus_per_task * size.ranks_per_node)
    return [*step, *_pyxis(container, folder)]


def _step(size: JobSize, *, cpus: int, mpi: str = "none") -> list[str]:
    """An srun on the allocation's first nodes. A rank that fails must not leave the others waiting in a collective, and
    srun does not inherit the CPUs per task from sbatch."""
    return [
        "srun", "--kill-on-bad-exit=1", f"--nodes={size.nodes}", f"--ntasks={size.ranks}",
        f"--ntasks-per-node={size.ranks_per_node}", f"--cpus-per-task={cpus}", f"--mpi={mpi}", "--label",
    ]  # fmt: skip


def _pyxis(container: Container | None, folder: Path) -> list[str]:
    if container is None or container.runtime != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []  # empty: refused
    return [f"--container-image={container.image}", *mounts, f"--container-workdir={folder}"]


def _apptainer(container: Container | None, folder: Path) -> list[str]:
    if container is None or container.runtime != "apptainer":
        return []
    mounts = [part for mount in container.mounts for part in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *mounts, "--pwd", str(folder), container.image]
