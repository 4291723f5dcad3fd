"""The command that starts a task's ranks inside an allocation: srun alone, torchrun on each node, or MPI through PMIx."""

from collections.abc import Sequence
from pathlib import Path

from megatron_specialm.config.site import Container, Launcher
from megatron_specialm.slurm.allocation import Allocation
from megatron_specialm.slurm.sbatch import Shape


def rank_command(
    command: Sequence[str], *, launcher: Launcher, shape: Shape, allocation: Allocation, port: int,
    container: Container | None, folder: Path,
) -> list[str]:  # fmt: skip
    """The whole command line.

    Args:
        command: what each rank runs; its first word is a Python interpreter.
        port: a free one on the first node, where torchrun's ranks meet.
        folder: where ranks stand, also in a container.
    """
    if launcher == "torchrun":
        agent = [
            command[0], "-m", "torch.distributed.run", f"--nnodes={shape.nodes}", f"--nproc-per-node={shape.ranks_per_node}",
            f"--master-addr={allocation.address}", f"--master-port={port}", "--no-python",
        ]  # fmt: skip
        # A node's number is known on the node; torchrun takes it from PET_NODE_RANK.
        numbered = ["bash", "-c", 'PET_NODE_RANK=$SLURM_NODEID exec "$@"', "torchrun"]
        step = _step_on_nodes(shape, allocation, container, folder)
        return [*step, *numbered, *_apptainer(container, folder), *agent, *command]
    step = _step(shape, cpus=allocation.cpus_per_task, mpi="pmix" if launcher == "mpi" else "none")
    return [*step, *_pyxis(container, folder), *_apptainer(container, folder), *command]


def node_command(
    command: Sequence[str], *, shape: Shape, allocation: Allocation, container: Container | None, folder: Path
) -> list[str]:
    """A command once on each node of `shape`, where its ranks would run it, and with all their CPUs."""
    return [*_step_on_nodes(shape, allocation, container, folder), *_apptainer(container, folder), *command]


def _step_on_nodes(shape: Shape, allocation: Allocation, container: Container | None, folder: Path) -> list[str]:
    step = _step(Shape(shape.nodes, 1), cpus=allocation.cpus_per_task * shape.ranks_per_node)
    return [*step, *_pyxis(container, folder)]


def _step(shape: Shape, *, cpus: int, mpi: str = "none") -> list[str]:
    """An srun on the allocation's first nodes. A rank that fails must not leave the others waiting in a collective, and
    srun does not take the CPUs per task from sbatch by itself."""
    return [
        "srun", "--kill-on-bad-exit=1", f"--nodes={shape.nodes}", f"--ntasks={shape.ranks}",
        f"--ntasks-per-node={shape.ranks_per_node}", f"--cpus-per-task={cpus}", f"--mpi={mpi}", "--label",
    ]  # fmt: skip


def _pyxis(container: Container | None, folder: Path) -> list[str]:
    if container is None or container.runtime != "pyxis":
        return []
    mounts = (
        [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    )  # it refuses an empty list
    return [f"--container-image={container.image}", *mounts, f"--container-workdir={folder}"]


def _apptainer(container: Container | None, folder: Path) -> list[str]:
    if container is None or container.runtime != "apptainer":
        return []
    mounts = [part for mount in container.mounts for part in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *mounts, "--pwd", str(folder), container.image]
