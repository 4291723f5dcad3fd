"""Where DeepSpeed's optimizers keep main weights, gradients and moments of a parameter: one class per kind of optimizer.

ZeRO-1 and 2 lay the parameters of a group one after the other and give each data-parallel rank an equal part of it; ZeRO-3
gives each rank a part of every parameter. Either way what a rank holds of a parameter is a range in a flat fp32 tensor, by
which Adam keeps its state.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from megatron_specialm.engine.shards import OptimizerShard, whole_parameter
from megatron_specialm.engine.state import MOMENTS
from megatron_specialm.model.gpt import LocalParameter


class Range(NamedTuple):
    """What this process holds of a parameter: of it, flattened, `length` elements from `first` on, which are those from `start`
    on of the tensor `flat`."""

    flat: torch.Tensor
    start: int
    first: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The range in a tensor of the shape of `flat`."""
        return tensor.detach().view(-1)[self.start : self.start + self.length]


class DeepSpeedShards(ABC):
    """See `ShardedOptimizer`.

    Args:
        zero: DeepSpeed's optimizer.
        adam: PyTorch's AdamW inside it.
    """

    is_split = True  # between data-parallel ranks

    def __init__(self, zero: Any, adam: torch.optim.Optimizer) -> None:
        self._zero, self._adam = zero, adam

    @abstractmethod
    def held(self, parameter: torch.nn.Parameter) -> Range | None:
        """What this process holds of a trained parameter; None if nothing."""

    @abstractmethod
    def gradient(self, weight: LocalParameter) -> torch.Tensor | None:
        """See `ShardedOptimizer.gradient`: a view, until the step is made."""

    @abstractmethod
    def discard_gradients(self) -> None:
        """Forget the gradients: the next step begins."""

    @abstractmethod
    def publish(self) -> None:
        """Give all ranks the parameters that the main weights have become."""

    def shard(self, weight: LocalParameter) -> OptimizerShard:
        """See `ShardedOptimizer.shard`."""
        parameter = weight.parameter
        if not parameter.requires_grad:
            return whole_parameter(parameter)
        if (held := self.held(parameter)) is None:
            return OptimizerShard(None, slice(0, 0), self.is_split)
        return OptimizerShard(held.of(held.flat), slice(held.first, held.first + held.length), self.is_split)

    def moments(self, weight: LocalParameter) -> dict[str, torch.Tensor]:
        """See `ShardedOptimizer.moments`."""
        held = self.held(weight.parameter)
        assert held is not None
        state = self._adam.state[held.flat]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(held.flat, requires_grad=False)
        return {moment: held.of(state[moment]) for moment in MOMENTS}

    @property
    def steps(self) -> float:
        """See `ShardedOptimizer`."""
        return float(next(iter(self._adam.state.values()))["step"])

    @steps.setter
    def steps(self, steps: float) -> None:
        for flat, state in self._adam.state.items():
            state["step"] = torch.tensor(steps, device=flat.device)


class WholeShards(DeepSpeedShards):
    """ZeRO-0: PyTorch's AdamW, on every rank over all parameters."""

    is_split = False

    def held(self, parameter: torch.nn.Parameter) -> Range:
        """See `DeepSpeedShards.held`."""
        return Range(parameter, 0, 0, parameter.numel())

    def gradient(self, weight: LocalParameter) -> torch.Tensor | None:
        """See `DeepSpeedShards.gradient`."""
        parameter = weight.parameter
        return None if parameter.grad is None else parameter.grad.view(-1)

    def discard_gradients(self) -> None:
        """See `DeepSpeedShards.discard_gradients`."""
        self._adam.zero_grad()

    def publish(self) -> None:
        """See `DeepSpeedShards.publish`: main weights and parameters are the same tensors."""


class FlatShards(DeepSpeedShards):
    """ZeRO-1 and 2 (`DeepSpeedZeroOptimizer`)."""

    flat_tensors = "single_partition_of_fp32_groups"

    def held(self, parameter: torch.nn.Parameter) -> Range | None:
        """See `DeepSpeedShards.held`."""
        if (held := parameter._hp_mapping) is None:  # type: ignore[attr-defined]
            return None
        main, own = held.hp_fragment_address, held.lp_fragment_address
        flat = getattr(self._zero, self.flat_tensors)[held.param_group_index]
        return Range(flat, main.start, own.start, own.numel)

    def gradient(self, weight: LocalParameter) -> torch.Tensor | None:
        """See `DeepSpeedShards.gradient`."""
        parameter = weight.parameter
        if (held := parameter._hp_mapping) is None:  # type: ignore[attr-defined]
            return None
        gradient = held.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)  # type: ignore[attr-defined]
        own = held.lp_fragment_address
        return gradient if gradient.numel() == own.numel else gradient[own.start : own.start + own.numel]

    def discard_gradients(self) -> None:
        """See `DeepSpeedShards.discard_gradients`."""
        self._zero.zero_grad()
        if self._zero.cpu_offload:
            self._zero.reset_cpu_buffers()
        for gradients in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))

    def publish(self) -> None:
        """See `DeepSpeedShards.publish`."""
        self._zero.update_lp_params()


class Bf16Shards(FlatShards):
    """ZeRO-1 in bf16 with gradients summed in fp32 (`BF16_Optimizer`): every rank has a buffer for the whole gradient."""

    flat_tensors = "fp32_groups_flat_partition"

    def discard_gradients(self) -> None:
        """See `DeepSpeedShards.discard_gradients`."""
        self._zero.clear_hp_grads()
        self._zero.clear_lp_grads()


class PartitionedShards(DeepSpeedShards):
    """ZeRO-3 (`DeepSpeedZeroOptimizer_Stage3`)."""

    def held(self, parameter: torch.nn.Parameter) -> Range | None:
        """See `DeepSpeedShards.held`."""
        group, start, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
        first = parallel_state.get_data_parallel_rank() * padded
        length = min(padded, parameter.ds_numel - first)  # type: ignore[attr-defined]
        return Range(self._zero.fp32_partitioned_groups_flat[group], start, first, length) if length > 0 else None

    def gradient(self, weight: LocalParameter) -> torch.Tensor | None:
        """See `DeepSpeedShards.gradient`."""
        parameter = weight.parameter
        if (held := self.held(parameter)) is None:
            return None
        gradient, _ = self._zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)
        return gradient.view(-1)[: held.length]  # type: ignore[no-any-return]

    def discard_gradients(self) -> None:
        """See `DeepSpeedShards.discard_gradients`."""
        self._zero.zero_grad()
        self._zero._pre_step()
        self._zero.averaged_gradients = {}

    def publish(self) -> None:
        """See `DeepSpeedShards.publish`."""
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)


_KINDS: dict[str, type[DeepSpeedShards]] = {
    "AdamW": WholeShards,
    "DeepSpeedZeroOptimizer": FlatShards,
    "BF16_Optimizer": Bf16Shards,
    "DeepSpeedZeroOptimizer_Stage3": PartitionedShards,
}  # by the class of DeepSpeed's optimizer


def shards_of(zero: Any, adam: torch.optim.Optimizer) -> DeepSpeedShards:
    """The shards of DeepSpeed's optimizer, which it has chosen by stage and precision."""
    return _KINDS[type(zero).__name__](zero, adam)
