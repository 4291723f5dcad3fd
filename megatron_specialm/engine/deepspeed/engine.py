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
from megatron_specialm.engine.deepspeed.package import deepspeed_module, initialize
from megatron_specialm.engine.deepspeed.shards import shards_of
from megatron_specialm.engine.gpt_engine import GptEngine
from megatron_specialm.engine.objective import Objective, cross_entropy
from megatron_specialm.engine.protocol import LossSum, StepStats
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt, LocalParameter
from megatron_specialm.model.router import auxiliary_losses_times
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
            packing=setup.packing,
            objective=objective,
            teacher=teacher,
        )
        assert isinstance(setup.parallel, DeepSpeedConfig)
        self._passes_are_joint = setup.parallel.zero_stage == 3 or setup.parallel.expert_parallel > 1
        self._backward_passes_are_joint = setup.parallel.zero_stage >= 2 or setup.parallel.expert_parallel > 1
        self._clip_grad = optimizer.clip_grad
        self._context_length = setup.context_length
        (chunk,) = model.chunks
        for weight in model.weights():  # DeepSpeed skips the others on all tensor-parallel ranks but the first
            weight.parameter.model_parallel = weight.spec.cut is not None or weight.spec.is_expert  # type: ignore[attr-defined]
        trained = [weight for weight in model.weights() if weight.parameter.requires_grad]
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for weight in trained:
            kept = getattr(weight.parameter, "keep_fp32", False)
            groups.setdefault((not decays(weight.name), kept), []).append(weight.parameter)
        adam = torch.optim.AdamW(
            _with_experts_apart(
                [
                    {"name": str(kind), "params": parameters, "weight_decay": optimizer.weight_decay * (not kind[0])}
                    for kind, parameters in sorted(groups.items())
                ]
            ),
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
        before = self.passes
        tokens = self._sum_over_copies(float(batch.mask.sum()))
        scale = self.data_parallel / tokens
        micro_batches, sums = self._micro_batches([batch], jointly=self._backward_passes_are_joint), []
        derived = self._model.derived
        self._gates.begin_step()
        with auxiliary_losses_times(scale):
            for number, micro_batch in enumerate(micro_batches, start=1):
                self._zero.set_gradient_accumulation_boundary(derived is None and number == len(micro_batches))
                output, loss = self._forward(self._zero, 0, micro_batch)
                total = loss(output)
                self._backward(total * scale)
                sums.append(total.detach())
        if derived is not None:
            self._zero.set_gradient_accumulation_boundary(True)
            derived.backward(self._backward)
        self._count(micro_batches, forward_only=False)
        return self._reduce(sums, tokens=int(batch.mask.sum()), before=before)

    def apply_gradients(self, loss: LossSum, *, learning_rate: float) -> StepStats:
        """See `Engine.apply_gradients`."""
        self._state.finish_copy()
        gradients = list(self._own_gradients())
        self._squares = self._counted_squares(gradients)
        norm = math.sqrt(self._sum_for_norm(sum(self._squares.values())))
        if not math.isfinite(norm) or not math.isfinite(loss.total):
            self._shards.discard_gradients()
            return StepStats(loss, norm, skipped=True)
        if norm > self._clip_grad:
            factor = self._clip_grad / (norm + 1e-6)
            torch._foreach_mul_([gradient for _, gradient in gradients], factor)
            self._squares = {name: square * factor**2 for name, square in self._squares.items()}
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._zero.step()
        self._state.has_moments = True
        self._gates.end_step()
        return StepStats(loss, norm, skipped=False)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """See `Engine.evaluate`."""
        self._zero.eval()
        sums, tokens, before = [], 0, self.passes
        for batch in self._in_step_with_copies(batches):
            tokens += int(batch.mask.sum(dtype=np.float64))  # weights are large: exactly
            micro_batches = self._micro_batches([batch], jointly=self._passes_are_joint)
            for micro_batch in micro_batches:
                output, loss = self._forward(self._zero, 0, micro_batch)
                sums.append(loss(output))
            self._count(micro_batches, forward_only=True)
        return self._reduce(sums, tokens=tokens, before=before)

    def norm_squares(self) -> dict[str, float]:
        """See `Engine.norm_squares`. Without ZeRO each copy takes a norm of its own; the first one's is reported."""
        return self._squares if self._shards.is_split or self.data_rank == 0 else {}

    def load(self, weights: Mapping[str, Sliceable], optimizer_state: Mapping[str, Sliceable] | None) -> None:
        """See `Engine.load`."""
        super().load(weights, optimizer_state)
        self._shards.publish()

    def _backward(self, loss: torch.Tensor) -> None:
        self._zero.backward(loss, scale_wrt_gas=False)

    def _own_gradients(self) -> Iterator[tuple[LocalParameter, torch.Tensor]]:
        """This process's shards of the summed gradients."""
        for weight in self._model.weights():
            gradient = self._shards.gradient(weight) if weight.parameter.requires_grad else None
            if gradient is not None:
                yield weight, gradient

    def _counted_squares(self, gradients: list[tuple[LocalParameter, torch.Tensor]]) -> dict[str, float]:
        """By weight, the sums of squares of the gradients that are in the norm: of a weight that all tensor-parallel ranks
        hold, the first rank's alone. (ZeRO splits experts over all ranks that hold them.)"""
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        counted = [
            (weight.name, own)
            for weight, own in gradients
            if first or weight.spec.cut is not None or (weight.spec.is_expert and self._shards.is_split)
        ]
        if not counted:
            return {}
        squares = torch.stack(torch._foreach_norm([own for _, own in counted])).double().square()
        found: dict[str, float] = {}
        for (name, _), square in zip(counted, squares.tolist(), strict=True):  # one transfer from the device
            found[name] = found.get(name, 0.0) + square  # a weight may be several parameters, one for each expert
        return found

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
        """Batches of a micro-batch or less. Under ZeRO-3 copies gather parameters in each pass, and under expert parallelism
        each needs the experts of others. So all must make as many: one that has no window left gets some that do not count."""
        size, positions = self._micro_batch_size, self._context_length
        own = (
            batch.rows(slice(start, start + size)) for batch in batches for start in range(0, len(batch.tokens), size)
        )
        if not self._passes_are_joint:
            yield from own
            return
        tokens = np.zeros((size, positions), np.int64)
        nothing = Batch(tokens, tokens, tokens.astype(np.float32))
        while self._sum_over_copies((batch := next(own, None)) is not None):
            yield nothing if batch is None else batch


def _with_experts_apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of parameters such that experts, whose gradients are summed over other processes, are apart from all others."""
    utils = deepspeed_module("deepspeed.moe.utils")
    return utils.split_params_into_different_moe_groups_for_optimizer(groups)  # type: ignore[no-any-return]


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
