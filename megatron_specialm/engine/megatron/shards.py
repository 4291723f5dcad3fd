"""From the part of a weight that a process holds to the canonical whole, and back.

Tensor parallelism cuts a weight (`model/weights.py`); the distributed optimizer then deals out the elements of each
part, flattened, over the data-parallel copies.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_specialm.model.gpt import LocalParameter, own_part


class OptimizerShard(NamedTuple):
    """What the optimizer of this process holds of a parameter: its fp32 main tensor, None where it holds nothing;
    which elements of the flattened parameter these are; and the processes that hold the others, None where all hold all.
    """

    main: torch.Tensor | None
    elements: slice
    group: dist.ProcessGroup | None


def shard_of(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> OptimizerShard:
    """This process's shard of a parameter. One that is not trained is no optimizer's: every copy has it, as it was before
    it was rounded (`keep_original`)."""
    if not parameter.requires_grad:
        return OptimizerShard(getattr(parameter, "original", parameter), slice(0, parameter.numel()), None)
    if not isinstance(optimizer, DistributedOptimizer):
        return OptimizerShard(getattr(parameter, "main_param", parameter), slice(0, parameter.numel()), None)
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if parameter not in optimizer.model_param_group_index_map:
        return OptimizerShard(None, slice(0, 0), copies)
    group, _ = optimizer.model_param_group_index_map[parameter]
    # Its index there does not hold for a group of both precisions: the optimizer's list has those in fp32 first.
    trained = [*optimizer.model_fp32_groups[group], *optimizer.model_float16_groups[group]]
    index = next(index for index, other in enumerate(trained) if other is parameter)
    elements = optimizer._get_model_param_range_map(parameter)["param"]
    main = optimizer.optimizer.param_groups[group]["params"][index]
    return OptimizerShard(main, slice(elements.start, elements.end), copies)


def keep_original(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Keep a frozen parameter's fp32 value on the host, where training rounds it: what is saved, and what adapters are
    merged with, is the model that training started from."""
    if parameter.dtype != torch.float32:
        parameter.original = value.detach().float().cpu().view(parameter.shape)  # type: ignore[attr-defined]


def gather_whole(weight: LocalParameter, shard: OptimizerShard, value: torch.Tensor | None) -> torch.Tensor:
    """The canonical tensor of which each process holds a shard, fp32. All processes of a pipeline stage call it at once.

    Args:
        value: the shard of anything of the parameter's shape: its main weight, a moment, a gradient.
    """
    own = torch.zeros(weight.parameter.numel(), dtype=torch.float32, device=weight.parameter.device)
    if value is not None:
        own[shard.elements] = value.detach().float().flatten()
    if shard.group is not None:
        dist.all_reduce(own, group=shard.group)  # the others' elements are zeros: the sum is exact
    own = own.view(weight.parameter.shape)
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [own]
    if weight.spec.cut is not None and group.size() > 1:
        parts = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(parts, own, group=group)
    return weight.spec.join(parts)


def local_shard(weight: LocalParameter, shard: OptimizerShard, whole: torch.Tensor) -> torch.Tensor:
    """The elements of a canonical tensor that are this process's shard, flat."""
    return own_part(weight.spec, whole).flatten()[shard.elements]
