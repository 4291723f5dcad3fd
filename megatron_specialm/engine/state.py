"""What a checkpoint keeps of an engine: fp32 main weights and Adam's moments, as slices of canonical tensors."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

import torch
import torch.distributed as dist

from megatron_specialm.base.background import in_background
from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.checkpoint.slices import SavedTensors
from megatron_specialm.engine.shards import OptimizerShard, ShardedOptimizer, keep_original, owned_slices
from megatron_specialm.model.gpt import Gpt, LocalParameter, fill
from megatron_specialm.model.weights import Sliceable

MOMENTS = ("exp_avg", "exp_avg_sq")


class EngineState:
    """A model's weights with the state of its optimizer. `has_moments` is False before the first update."""

    def __init__(self, model: Gpt, optimizer: ShardedOptimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.has_moments = False
        self._copy_is_done: Future[None] | None = None

    def shards(self) -> Iterator[tuple[LocalParameter, OptimizerShard]]:
        """This process's parameters, each with what its optimizer holds of it."""
        for weight in self._model.weights():
            yield weight, self._optimizer.shard(weight)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`: under bf16 the optimizer's fp32 main weights, from which the bf16 ones are rounded."""
        return _copied(self._weights())

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of the last step, in slices as the weights. Clipping may have scaled them."""
        return _copied(self._owned(lambda weight, _: self._optimizer.gradient(weight)))

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """See `Engine.optimizer_state`. Names are `exp_avg/WEIGHT`, `exp_avg_sq/WEIGHT`, and `step` once for all."""
        return _copied(self._optimizer_state())

    def begin_copy(self) -> Future[SavedTensors]:
        """See `Engine.begin_copy`."""
        self.finish_copy()
        tensors = SavedTensors(self._weights(), self._optimizer_state())
        # On a GPU beside the passes, too: behind what has been launched, and on a stream of its own.
        stream = torch.cuda.Stream(self._model.device) if self._model.device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._model.device))

        done = self._copy_is_done = Future[None]()  # without the copy itself, which is as large as weights and moments

        def copy() -> SavedTensors:
            try:
                with torch.cuda.stream(stream):
                    found = SavedTensors(*map(_copied, tensors))
            except BaseException as error:
                done.set_exception(error)
                raise
            done.set_result(None)
            return found

        return in_background(copy, name="copy")

    def finish_copy(self) -> None:
        """Wait until what `begin_copy` copies may change. Raises the copy's error, as `MemoryError`."""
        done, self._copy_is_done = self._copy_is_done, None
        if done is not None:
            done.result()

    def _weights(self) -> dict[str, torch.Tensor]:
        return self._owned(lambda _, shard: shard.main, trained_only=False)

    def _optimizer_state(self) -> dict[str, torch.Tensor]:
        if not self.has_moments:
            return {}
        state: dict[str, torch.Tensor] = {}
        for moment in MOMENTS:
            own = self._owned(
                lambda weight, shard: None if shard.main is None else self._optimizer.moments(weight)[moment]  # noqa: B023
            )
            state.update({f"{moment}/{key}": tensor for key, tensor in own.items()})
        if dist.get_rank() == 0:
            state["step"] = torch.tensor(float(self._optimizer.steps))
        return state

    @torch.no_grad()
    def load(self, weights: Mapping[str, Sliceable], optimizer_state: Mapping[str, Sliceable] | None) -> None:
        """See `Engine.load`."""
        self.finish_copy()
        self._model.load(weights)
        for weight, shard in self.shards():
            if not weight.parameter.requires_grad:
                keep_original(weight, weights[weight.name])
            elif shard.main is not None:
                fill(shard.main.view(-1), weight.spec, weights[weight.name], first=shard.elements.start)
                if optimizer_state:
                    self._load_moments(weight, shard, optimizer_state)
        if optimizer_state:
            self._optimizer.steps = float(optimizer_state["step"][()])
            self.has_moments = True

    def _load_moments(self, weight: LocalParameter, shard: OptimizerShard, state: Mapping[str, Sliceable]) -> None:
        for moment, own in self._optimizer.moments(weight).items():
            name = f"{moment}/{weight.name}"
            if name not in state:
                raise CheckpointError(f"the optimizer's state lacks {name}: it is of another model")
            if tuple(state[name].shape) != tuple(weight.spec.shape):
                raise CheckpointError(
                    f"the optimizer's state has {name} of shape {tuple(state[name].shape)}, not {tuple(weight.spec.shape)}: "
                    "it is of another model"
                )
            fill(own.view(-1), weight.spec, state[name], first=shard.elements.start)

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


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In fp32 on the CPU."""
    return {
        key: tensor.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
