"""What a checkpoint keeps of an engine: fp32 main weights and Adam's moments, as slices of canonical tensors."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.engine.megatron.shards import OptimizerShard, keep_original, optimizer_of, owned_slices, shard_of
from megatron_specialm.model.gpt import Gpt, LocalParameter, fill
from megatron_specialm.model.weights import Sliceable

_MOMENTS = ("exp_avg", "exp_avg_sq")


class EngineState:
    """A model's weights with the state of its optimizer. `has_moments` is False before the first update."""

    def __init__(self, model: Gpt, optimizer: ChainedOptimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.has_moments = False

    def shards(self) -> Iterator[tuple[LocalParameter, OptimizerShard]]:
        """This process's parameters, each with what its optimizer holds of it."""
        for weight in self._model.weights():
            yield weight, shard_of(self._optimizer, weight)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`: under bf16 the optimizer's fp32 main weights, from which the bf16 ones are rounded."""
        return self._owned(lambda _, shard: shard.main, trained_only=False)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of the last step, in slices as the weights. Clipping may have scaled them. They are where Megatron-Core
        sums them: each parameter's in a part of a buffer, in fp32."""
        return self._owned(lambda weight, shard: weight.parameter.main_grad.flatten()[shard.elements])  # type: ignore[attr-defined]

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """See `Engine.optimizer_state`. Names are `exp_avg/WEIGHT`, `exp_avg_sq/WEIGHT`, and `step` once for all."""
        if not self.has_moments:
            return {}
        state: dict[str, torch.Tensor] = {}
        for moment in _MOMENTS:
            own = self._owned(
                lambda weight, shard: None if shard.main is None else self._adam(weight)[shard.main][moment]  # noqa: B023
            )
            state.update({f"{moment}/{key}": tensor for key, tensor in own.items()})
        if dist.get_rank() == 0:
            state["step"] = torch.tensor(float(self._steps()))
        return state

    @torch.no_grad()
    def load(self, weights: Mapping[str, Sliceable], optimizer_state: Mapping[str, Sliceable] | None) -> None:
        """See `Engine.load`."""
        self._model.load(weights)
        for weight, shard in self.shards():
            if not weight.parameter.requires_grad:
                keep_original(weight, weights[weight.name])
            elif shard.main is not None:
                fill(shard.main.view(-1), weight.spec, weights[weight.name], first=shard.elements.start)
                if optimizer_state:
                    self._load_moments(weight, shard, shard.main, optimizer_state)
        if optimizer_state:
            if self._counts_by_group:
                for group in self._optimizer.param_groups:
                    group["step"] = int(optimizer_state["step"][()])
            self.has_moments = True

    def _load_moments(
        self, weight: LocalParameter, shard: OptimizerShard, main: torch.Tensor, state: Mapping[str, Sliceable]
    ) -> None:
        own = {} if self._counts_by_group else {"step": state["step"][()].clone()}
        for moment in _MOMENTS:
            name = f"{moment}/{weight.name}"
            if name not in state:
                raise CheckpointError(f"the optimizer's state lacks {name}: it is of another model")
            if tuple(state[name].shape) != tuple(weight.spec.shape):
                raise CheckpointError(
                    f"the optimizer's state has {name} of shape {tuple(state[name].shape)}, not {tuple(weight.spec.shape)}: "
                    "it is of another model"
                )
            own[moment] = torch.empty_like(main, requires_grad=False)
            fill(own[moment].view(-1), weight.spec, state[name], first=shard.elements.start)
        self._adam(weight)[main] = own

    def _owned(
        self, value: Callable[[LocalParameter, OptimizerShard], torch.Tensor | None], *, trained_only: bool = True
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for weight, shard in self.shards():
            if weight.parameter.requires_grad or not trained_only:
                values = value(weight, shard)
                if values is not None:
                    found.update(owned_slices(weight, shard, values))
        return found

    def _steps(self) -> float:
        """How many updates the moments are of."""
        if self._counts_by_group:  # but not for a group of which this process holds nothing
            return float(max(group.get("step", 0) for group in self._optimizer.param_groups))
        return float(next(iter(self._optimizer.chained_optimizers[0].optimizer.state.values()))["step"])

    def _adam(self, weight: LocalParameter) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
        """Moments by main tensor, of the optimizer that has a weight."""
        return optimizer_of(self._optimizer, weight.spec).optimizer.state

    @property
    def _counts_by_group(self) -> bool:
        """Whether Adam counts its updates per group, as Transformer Engine's and apex's do; PyTorch's does per parameter."""
        return not isinstance(self._optimizer.chained_optimizers[0].optimizer, torch.optim.AdamW)
