"""The process group of a run, from its opening to its closing."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_specialm.base.environment import World, help_gloo
from megatron_specialm.base.errors import MachineError
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.model import cpu


def device_of(world: World) -> torch.device:
    """The device of this process: its node's GPU of its local rank, or the CPU. Where each process is shown one GPU alone, as
    by `srun --gpus-per-task`, it is that one.

    Raises:
        MachineError: there are more processes on this node than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if 1 < visible <= world.local_rank:
        raise MachineError(
            f"process {world.local_rank} of this node (counted from 0) has no GPU of its own, as {visible} are visible: start "
            "one process per GPU"
        )
    return torch.device("cuda", world.local_rank if visible > 1 else 0)


def device_name(world: World) -> str:
    """The name of this process's device, as its maker gives it."""
    return torch.cuda.get_device_name(device_of(world)) if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def process_group(
    world: World,
    *,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
    threads: int = 1,
    timeout_seconds: float = 600,
) -> Iterator[None]:
    """Join the other processes (gloo on CPU, NCCL on GPU), in the groups of a layout; leave on the way out.

    Raises:
        MachineError: the meeting point cannot be reached or its port is taken, or the layout is for another number of
            processes.
    """
    if world.world_size != parallel.world_size:
        raise MachineError(
            f"{world.world_size} processes were started, and the layout {parallel.describe()} is for "
            f"{parallel.world_size}: start as many, or change `parallel`"
        )
    cpu.install()
    torch.set_num_threads(threads)
    device = device_of(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    help_gloo(world.init_method)
    meeting: dict = {"init_method": world.init_method} if world.world_size > 1 else {"store": dist.HashStore()}
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
            **meeting,
        )
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError, ValueError) as error:
        address = world.init_method if world.init_method != "env://" else _torchrun_address()
        raise MachineError(
            f"rank {world.rank} of {world.world_size} cannot meet the others at {address}: {error}. "
            "If the port is in use, choose another (torchrun --master-port, or MASTER_PORT)"
        ) from None
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_parallel,
            pipeline_model_parallel_size=parallel.pipeline_parallel,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context_parallel,
            distributed_timeout_minutes=timeout_seconds / 60,
        )
        # Asked for by Transformer Engine and recomputation; nothing is drawn from it.
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def data_rank() -> tuple[int, int]:
    """Which of the data-parallel copies this process belongs to, and how many there are."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def _torchrun_address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
