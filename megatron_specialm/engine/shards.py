"""Which elements of a canonical tensor a process holds.

Tensor parallelism cuts a weight (`model/weights.py`); the distributed optimizer, or ZeRO, then deals out the elements of each
part, flattened, over the data-parallel copies.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_specialm.checkpoint.slices import slice_key
from megatron_specialm.model.gpt import LocalParameter, fill, local_pieces, tensor_parallel_group
from megatron_specialm.model.weights import Sliceable, WeightSpec


class OptimizerShard(NamedTuple):
    """What the optimizer of this process holds of a parameter: its fp32 main tensor, None where it holds nothing; which
    elements of the flattened parameter these are; and whether data-parallel copies hold the others (`is_split`), as under the
    distributed optimizer, or every copy holds all."""

    main: torch.Tensor | None
    elements: slice
    is_split: bool


class ShardedOptimizer(Protocol):
    """An engine's Adam, as what a checkpoint keeps is read from it and written to it.

    steps: how many updates the moments are of.
    """

    steps: float

    def shard(self, weight: LocalParameter) -> OptimizerShard:
        """This process's shard of a parameter."""

    def gradient(self, weight: LocalParameter) -> torch.Tensor | None:
        """The shard's gradient of this step, summed over all processes; None where this process holds nothing."""

    def moments(self, weight: LocalParameter) -> dict[str, torch.Tensor]:
        """The shard's `exp_avg` and `exp_avg_sq`, to be read or filled. The parameter is trained and has a shard here."""


def whole_parameter(parameter: torch.nn.Parameter) -> OptimizerShard:
    """The shard of a parameter that every copy holds all of. A frozen one is as it was before it was rounded
    (`keep_original`)."""
    main = getattr(parameter, "original" if not parameter.requires_grad else "main_param", parameter)
    return OptimizerShard(main, slice(0, parameter.numel()), is_split=False)


def keep_original(weight: LocalParameter, whole: Sliceable) -> None:
    """Keep a frozen parameter's fp32 value on the host, where training rounds it: what is saved, and what adapters are
    merged with, is the model that training started from."""
    parameter = weight.parameter
    if parameter.dtype != torch.float32:
        parameter.original = torch.empty(parameter.shape)  # type: ignore[attr-defined]
        fill(parameter.original.view(-1), weight.spec, whole)  # type: ignore[attr-defined]


def owned_slices(
    weight: LocalParameter, shard: OptimizerShard, values: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The slices of a canonical tensor that this process writes, by their keys (`checkpoint/slices.py`), as views if they
    can be. Where several processes hold the same elements, each writes an equal part of them; over all processes, every
    element is written once, and nothing is sent.

    Args:
        values: this process's shard of anything of the parameter's shape: its main weight, a moment, a gradient.
    """
    if getattr(weight.parameter, "shared", False):  # an embedding's copy, on the last pipeline stage
        return
    flat, (number, copies) = values.detach().reshape(-1), _copy_number(weight, shard)
    start, stop = (flat.numel() * part // copies for part in (number, number + 1))
    for index, piece in local_pieces(flat[start:stop], weight.spec, first=shard.elements.start + start):
        yield slice_key(weight.name, index, weight.spec.shape), piece


def _copy_number(weight: LocalParameter, shard: OptimizerShard) -> tuple[int, int]:
    """Which of the processes that hold the same elements this one is, and how many there are."""
    tensor, data = tensor_parallel_group(weight.spec), copies_group(weight.spec)
    number, copies = (0, 1) if weight.spec.cut is not None else (tensor.rank(), tensor.size())
    return (number, copies) if shard.is_split else (number * data.size() + data.rank(), copies * data.size())


def data_parallel_group() -> dist.ProcessGroup:
    """The processes with the same weights but for experts, those of context parallelism included."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def copies_group(spec: WeightSpec) -> dist.ProcessGroup:
    """The processes with the same tensor-parallel shard of a weight: copies of the model, or those with the same expert."""
    return parallel_state.get_expert_data_parallel_group() if spec.is_expert else data_parallel_group()
