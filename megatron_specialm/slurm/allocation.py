"""What Slurm gave to this attempt at a job: read in the batch step, on the first node."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_specialm.base.errors import MachineError
from megatron_specialm.slurm.queue import slurm


@dataclass(frozen=True)
class Allocation:
    """`job` is Slurm's name of this element: 123_0. (The last element of an array has the array's own id as SLURM_JOB_ID, and
    what scontrol does to that, it does to all.) `attempt` counts from 0. `address` is the first node's as Slurm itself
    reaches it: names of nodes need not resolve."""

    job: str
    element: int | None
    attempt: int
    nodes: tuple[str, ...]
    address: str
    cpus_per_task: int
    gpus_per_node: int


def read_allocation(environ: Mapping[str, str] = os.environ) -> Allocation:
    """The allocation around this process.

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
