"""Where Megatron-Core's optimizer keeps main weights, gradients and moments of a parameter."""

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_specialm.engine.shards import OptimizerShard, whole_parameter
from megatron_specialm.engine.state import MOMENTS
from megatron_specialm.model.gpt import LocalParameter


class MegatronShards:
    """See `ShardedOptimizer`."""

    def __init__(self, optimizers: ChainedOptimizer) -> None:
        self._optimizers = optimizers

    def _optimizer(self, weight: LocalParameter) -> MegatronOptimizer:
        """The optimizer of a trained weight: experts have one of their own, behind that of all other weights."""
        return self._optimizers.chained_optimizers[-1 if weight.spec.is_expert else 0]

    def shard(self, weight: LocalParameter) -> OptimizerShard:
        """See `ShardedOptimizer.shard`."""
        parameter, optimizer = weight.parameter, self._optimizer(weight)
        if not parameter.requires_grad or not isinstance(optimizer, DistributedOptimizer):
            return whole_parameter(parameter)
        if parameter not in optimizer.model_param_group_index_map:
            return OptimizerShard(None, slice(0, 0), is_split=True)
        group, _ = optimizer.model_param_group_index_map[parameter]
        # Its index there does not hold for a group of both precisions: the optimizer's list has those in fp32 first.
        trained = [*optimizer.model_fp32_groups[group], *optimizer.model_float16_groups[group]]
        index = next(index for index, other in enumerate(trained) if other is parameter)
        elements = optimizer._get_model_param_range_map(parameter)["param"]
        main = optimizer.optimizer.param_groups[group]["params"][index]
        return OptimizerShard(main, slice(elements.start, elements.end), is_split=True)

    def gradient(self, weight: LocalParameter) -> torch.Tensor:
        """See `ShardedOptimizer.gradient`. Megatron-Core sums each parameter's in a part of a buffer, in fp32."""
        return weight.parameter.main_grad.flatten()[self.shard(weight).elements]  # type: ignore[attr-defined, no-any-return]

    def moments(self, weight: LocalParameter) -> dict[str, torch.Tensor]:
        """See `ShardedOptimizer.moments`."""
        main = self.shard(weight).main
        assert main is not None
        state = self._optimizer(weight).optimizer.state[main]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(main, requires_grad=False)
        return {moment: state[moment] for moment in MOMENTS}

    @property
    def steps(self) -> float:
        """See `ShardedOptimizer`."""
        if self._counts_by_group:  # but not for a group of which this process holds nothing
            return float(max(group.get("step", 0) for group in self._optimizers.param_groups))
        return float(next(iter(self._optimizers.chained_optimizers[0].optimizer.state.values()))["step"])

    @steps.setter
    def steps(self, steps: float) -> None:
        if self._counts_by_group:
            for group in self._optimizers.param_groups:
                group["step"] = int(steps)
        else:
            for part in self._optimizers.chained_optimizers:
                for state in part.optimizer.state.values():
                    state["step"] = torch.tensor(steps)

    @property
    def _counts_by_group(self) -> bool:
        """Whether Adam counts its updates per group, as Transformer Engine's and apex's do; PyTorch's does per parameter."""
        return not isinstance(self._optimizers.chained_optimizers[0].optimizer, torch.optim.AdamW)
