"""The process group of a run, from its opening to its closing."""

from megatron_specialm.model import cpu  # first: it imports Megatron-Core

# isort: split

import collections
import contextlib
import datetime
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_specialm.base.environment import World, choose_gloo_interface
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.rendezvous import rendezvous, rendezvous_address
from megatron_specialm.config.parallel import Layout, ParallelConfig

# Of a world's groups: all its ranks open the same ones in the same order, and the first one others of its own between.
_numbers: dict[World, Iterator[int]] = collections.defaultdict(itertools.count)


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


@contextlib.contextmanager
def process_group(
    world: World,
    *,
    parallel: Layout = ParallelConfig(),  # noqa: B008 (frozen)
    expert_tensor_parallel: int | None = None,
    threads: int = 1,
    timeout_seconds: float = 600,
) -> Iterator[None]:
    """Join the other processes (gloo on CPU, NCCL on GPU), in the groups of a layout; leave on the way out.

    Args:
        expert_tensor_parallel: processes over which an expert's matrices are split; default: as other matrices.

    Raises:
        MachineError: not all processes come, the meeting point cannot be used, or the layout is for another number of
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
        torch.set_float32_matmul_precision("highest")  # containers of vendors turn TF32 on
    timeout = datetime.timedelta(seconds=timeout_seconds)
    choose_gloo_interface(world.init_method)
    store = dist.PrefixStore(f"group-{next(_numbers[world])}", rendezvous(world))
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
        )
    except RuntimeError as error:  # the base of torch's own
        raise MachineError(
            f"rank {world.rank} of {world.world_size} cannot reach the others, whom it has met at {rendezvous_address(world)}: "
            f"{error}"
        ) from None
    try:
        with _one_group_per_lone_process():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor_parallel,
                pipeline_model_parallel_size=parallel.pipeline_parallel,
                virtual_pipeline_model_parallel_size=parallel.virtual_pipeline
                if parallel.virtual_pipeline > 1
                else None,
                context_parallel_size=parallel.context_parallel,
                expert_model_parallel_size=parallel.expert_parallel,
                expert_tensor_parallel_size=expert_tensor_parallel,
                distributed_timeout_minutes=timeout_seconds / 60,
            )
        # Asked for by Transformer Engine and recomputation; nothing is drawn from it.
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def limit_collectives(seconds: float) -> None:
    """Have every collective of the layout's groups fail that takes longer. Groups that are made beside them, as for saving
    (`base/control_group.py`), keep their own limits."""
    for group in parallel_state._global_process_group_list or [None]:  # None: the default group
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


@contextlib.contextmanager
def _one_group_per_lone_process() -> Iterator[None]:
    """While Megatron-Core makes its groups, those of one and the same process are one. It makes twenty, of which a small
    layout's have mostly one member: nothing is sent in them, and each has threads of its own that look for messages.
    Groups are made by all processes in one order, and so are these."""
    make = parallel_state.create_group
    made: dict[tuple[int, str], dist.ProcessGroup] = {}

    def create_group(ranks: list[int], *args: Any, backend: str | None = None, **settings: Any) -> dist.ProcessGroup:
        if len(ranks) > 1:
            return make(ranks, *args, backend=backend, **settings)
        whose = ranks[0], backend or dist.get_backend()
        if whose not in made:
            made[whose] = make(ranks, *args, backend=backend, **settings)
        return made[whose]

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = make
