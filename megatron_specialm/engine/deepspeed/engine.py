"""The DeepSpeed engine: ZeRO and its optimizers around one model.

DeepSpeed averages gradients over data-parallel ranks; here a gradient is a sum over the global batch's tokens, divided once by
their number. So the number is exchanged before the passes, and each micro-batch's loss is divided by it. The global norm is
taken, and gradients are clipped, on the shards that ZeRO leaves on each process, before its step.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_specialm.config.parallel import DeepSpeedConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.deepspeed.library import initialize
from megatron_specialm.engine.deepspeed.shards import shards_of
from megatron_specialm.engine.gpt_engine import GptEngine
from megatron_specialm.engine.objective import DeviceBatch, Objective, cross_entropy
from megatron_specialm.engine.protocol import LossSum, StepStats
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.weights import Sliceable, decays

MAX_BUCKET = 500_000_000  # elements that are reduced at once


class DeepSpeedEngine(GptEngine):
    """A model in any layout of `DeepSpeedConfig`, with its optimizer. For the teacher and errors see `GptEngine`."""

    def __init__(
        self,
        model: Gpt,
        *,
        setup: Setup,
        optimizer: Adam,
        objective: Objective = cross_entropy,
        teacher: Gpt | None = None,
    ) -> None:
        super().__init__(
            model,
            parallel=setup.parallel,
            micro_batch_size=setup.micro_batch_size,
            objective=objective,
            teacher=teacher,
        )
        assert isinstance(setup.parallel, DeepSpeedConfig)
        self._zero_stage = setup.parallel.zero_stage
        self._clip_grad = optimizer.clip_grad
        self._context_length = setup.context_length
        (chunk,) = model.chunks
        for weight in model.weights():  # DeepSpeed skips the others on all tensor-parallel ranks but the first
            weight.parameter.model_parallel = weight.spec.cut is not None  # type: ignore[attr-defined]
        trained = [weight for weight in model.weights() if weight.parameter.requires_grad]
        groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for weight in trained:
            groups[decays(weight.name)].append(weight.parameter)
        adam = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": optimizer.weight_decay * decayed}
                for decayed, parameters in groups.items()
                if parameters
            ],
            lr=0.0,  # set in `apply_gradients`, at every step
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            fused=True,
        )  # fmt: skip
        largest = sum(weight.parameter.numel() for weight in trained)
        settings = _settings(setup, bucket=min(largest, MAX_BUCKET))
        self._zero = initialize(chunk, adam, device=model.device, settings=settings)
        self._shards = shards_of(self._zero.optimizer, adam)
        self._keep_state_of(self._shards, adam)
        self._squares: dict[str, float] = {}

    def accumulate_gradients(self, batch: Batch) -> LossSum:
        """See `Engine.accumulate_gradients`."""
        self._shards.discard_gradients()
        self._zero.train()
        tokens = self._sum_over_copies(float(batch.mask.sum()))
        micro_batches, sums = self._micro_batches([batch]), []
        derived = self._model.derived
        for number, micro_batch in enumerate(micro_batches, start=1):
            self._zero.set_gradient_accumulation_boundary(derived is None and number == len(micro_batches))
            output, loss = self._forward(self._zero, 0, micro_batch)
            total = loss(output)
            self._backward(total * (self.data_parallel / tokens))
            sums.append(total.detach())
        if derived is not None:
            self._zero.set_gradient_accumulation_boundary(True)
            derived.backward(self._backward)
        self._count(micro_batches, forward_only=False)
        return self._reduce(sums, int(batch.mask.sum()))

    def apply_gradients(self, loss: LossSum, *, learning_rate: float) -> StepStats:
        """See `Engine.apply_gradients`."""
        gradients = dict(self._own_gradients())
        self._squares = self._counted_squares(gradients)
        norm = math.sqrt(self._sum_for_norm(sum(self._squares.values())))
        if not math.isfinite(norm) or not math.isfinite(loss.total):
            self._shards.discard_gradients()
            return StepStats(loss, norm, skipped=True)
        if norm > self._clip_grad:
            factor = self._clip_grad / (norm + 1e-6)
            torch._foreach_mul_(list(gradients.values()), factor)
            self._squares = {name: square * factor**2 for name, square in self._squares.items()}
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._zero.step()
        self._state.has_moments = True
        return StepStats(loss, norm, skipped=False)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """See `Engine.evaluate`."""
        self._zero.eval()
        sums, tokens = [], 0
        for batch in self._in_step_with_copies(batches):
            tokens += int(batch.mask.sum(dtype=np.float64))  # weights are large: exactly
            micro_batches = self._micro_batches([batch])
            for micro_batch in micro_batches:
                output, loss = self._forward(self._zero, 0, micro_batch)
                sums.append(loss(output))
            self._count(micro_batches, forward_only=True)
        return self._reduce(sums, tokens)

    def norm_squares(self) -> dict[str, float]:
        """See `Engine.norm_squares`. Without ZeRO each copy takes a norm of its own; the first one's is reported."""
        return self._squares if self._shards.is_split or self.data_rank == 0 else {}

    def load(self, weights: Mapping[str, Sliceable], optimizer_state: Mapping[str, Sliceable] | None) -> None:
        """See `Engine.load`."""
        super().load(weights, optimizer_state)
        self._shards.publish()

    def _backward(self, loss: torch.Tensor) -> None:
        self._zero.backward(loss, scale_wrt_gas=False)

    def _own_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This process's shards of the summed gradients, by weight."""
        for weight in self._model.weights():
            gradient = self._shards.gradient(weight) if weight.parameter.requires_grad else None
            if gradient is not None:
                yield weight.name, gradient

    def _counted_squares(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The sums of squares of the gradients that are in the norm: of a weight that all tensor-parallel ranks hold, the
        first rank's alone."""
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        counted = {name: own for name, own in gradients.items() if first or self._model.specs[name].cut is not None}
        if not counted:
            return {}
        squares = torch.stack(torch._foreach_norm(list(counted.values()))).double().square()
        return dict(zip(counted, squares.tolist(), strict=True))  # one transfer from the device

    def _sum_for_norm(self, square: float) -> float:
        total = self._sum_over_copies(square) if self._shards.is_split else square
        return self._sum(total, parallel_state.get_tensor_model_parallel_group())

    def _sum_over_copies(self, value: float) -> float:
        return self._sum(value, self._data_parallel_group)

    def _sum(self, value: float, group: dist.ProcessGroup) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self._model.device)
        dist.all_reduce(total, group=group)
        return float(total)

    def _in_step_with_copies(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches of a micro-batch or less. Under ZeRO-3 copies gather parameters in each pass, so all must make as many: one
        that has no window left gets some that do not count."""
        size, positions = self._micro_batch_size, self._context_length
        own = (
            batch.rows(slice(start, start + size)) for batch in batches for start in range(0, len(batch.tokens), size)
        )
        if self._zero_stage < 3:
            yield from own
            return
        tokens = np.zeros((size, positions), np.int64)
        nothing = Batch(tokens, tokens, tokens.astype(np.float32))
        while self._sum_over_copies((batch := next(own, None)) is not None):
            yield nothing if batch is None else batch

    def _count(self, micro_batches: list[DeviceBatch], *, forward_only: bool) -> None:
        slots = sum(micro_batch.tokens.numel() for micro_batch in micro_batches)
        self.passes = self.passes.after(slots, self._mixture_count, forward_only=forward_only)


def _settings(setup: Setup, *, bucket: int) -> dict[str, Any]:
    """DeepSpeed's config. It clips nothing: `apply_gradients` does."""
    parallel = setup.parallel
    assert isinstance(parallel, DeepSpeedConfig)
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "reduce_bucket_size": bucket,
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": False,
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": setup.global_batch_size,
        "train_micro_batch_size_per_gpu": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.micro_batches,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "bf16": {"enabled": setup.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeedCPUAdam is compiled at start-up
        "zero_allow_untested_optimizer": True,
    }
