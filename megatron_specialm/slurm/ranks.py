"""The command that starts a task's ranks inside an allocation: srun alone, torchrun on each node, or MPI through PMIx."""

from collections.abc import Sequence

from megatron_specialm.config.site import Container, Launcher
from megatron_specialm.slurm.allocation import Allocation
from megatron_specialm.slurm.sbatch import Shape


def rank_command(
    command: Sequence[str], *, launcher: Launcher, shape: Shape, allocation: Allocation, port: int, container: Container | None
) -> list[str]:  # fmt: skip
    """The whole command line.

    Args:
        command: what each rank runs; its first word is a Python interpreter.
        port: a free one on the first node, where torchrun's ranks meet.
    """
    if launcher == "torchrun":
        agent = [
            command[0], "-m", "torch.distributed.run", f"--nnodes={shape.nodes}", f"--nproc-per-node={shape.ranks_per_node}",
            f"--master-addr={allocation.address}", f"--master-port={port}", "--no-python",
        ]  # fmt: skip
        # A node's number is known on the node; torchrun takes it from PET_NODE_RANK.
        on_each_node = ["bash", "-c", 'PET_NODE_RANK=$SLURM_NODEID exec "$@"', "torchrun"]
        step = step_command(allocation, Shape(shape.nodes, 1), cpus=allocation.cpus_per_task * shape.ranks_per_node)
        return [*step, *_pyxis(container), *on_each_node, *_apptainer(container), *agent, *command]
    mpi = "pmix" if launcher == "mpi" else "none"
    step = step_command(allocation, shape, cpus=allocation.cpus_per_task, mpi=mpi)
    return [*step, *_pyxis(container), *_apptainer(container), *command]


def step_command(allocation: Allocation, shape: Shape, *, cpus: int, mpi: str = "none") -> list[str]:
    """An srun on the allocation's first nodes. A rank that fails must not leave the others waiting in a collective, and
    srun does not take the CPUs per task from sbatch by itself."""
    return [
        "srun", "--kill-on-bad-exit=1", f"--nodes={shape.nodes}", f"--ntasks={shape.ranks}",
        f"--ntasks-per-node={shape.ranks_per_node}", f"--cpus-per-task={cpus}", f"--mpi={mpi}", "--label",
    ]  # fmt: skip


def _pyxis(container: Container | None) -> list[str]:
    if container is None or container.runtime != "pyxis":
        return []
    return [f"--container-image={container.image}", f"--container-mounts={','.join(container.mounts)}"]


def _apptainer(container: Container | None) -> list[str]:
    if container is None or container.runtime != "apptainer":
        return []
    mounts = [part for mount in container.mounts for part in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *mounts, container.image]
