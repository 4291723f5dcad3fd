"""The Megatron engine: Megatron-Core's data parallelism, schedule and mixed-precision optimizer around one `GPTModel`."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.schema import Optimizer
from megatron_specialm.data.store import Batch
from megatron_specialm.model import gpt
from megatron_specialm.model.cpu import cuda_type_names
from megatron_specialm.train.engine import LossSum, StepStats
from megatron_specialm.train.evaluation import score
from megatron_specialm.train.losses import DeviceBatch, cross_entropy

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MegatronEngine:
    """A model in data parallelism: every process holds all of it and sees its share of each global batch."""

    def __init__(
        self,
        model: GPTModel,
        *,
        optimizer: Optimizer,
        vocabulary_size: int,
        micro_batch_size: int,
    ) -> None:
        self._config = get_model_config(model)
        self._vocabulary_size = vocabulary_size
        self._micro_batch_size = micro_batch_size
        self._clip_grad = optimizer.clip_grad
        self._device = next(model.parameters()).device
        self._group = parallel_state.get_data_parallel_group()
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        inner = Float16Module(self._config, model) if self._config.bf16 else model
        self._model = DistributedDataParallel(self._config, ddp, inner)
        self._config.finalize_model_grads_func = finalize_model_grads
        self._config.no_sync_func = self._model.no_sync
        self._optimizer = _build_optimizer(self._model, optimizer, bf16=self._config.bf16)
        self._forward_backward = get_forward_backward_func()

    def train_step(self, batch: Batch, *, learning_rate: float) -> StepStats:
        """See `Engine.train_step`."""
        self._model.train()
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        micro_batches = list(self._micro_batches(batch))
        sums = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=iter(micro_batches),
            model=self._model,
            num_microbatches=len(micro_batches),
            seq_length=batch.tokens.shape[1],
            micro_batch_size=self._micro_batch_size,
        )
        loss = self._reduce(torch.stack(sums).double().sum(), int(batch.mask.sum()))
        return self._apply_gradients(loss, learning_rate)

    def _forward_step(self, micro_batches: Iterator[DeviceBatch], model: torch.nn.Module) -> tuple:
        batch = next(micro_batches)
        return gpt.logits(model, batch.tokens, vocabulary_size=self._vocabulary_size), partial(self._loss, batch)

    def _loss(self, batch: DeviceBatch, logits_BTV: torch.Tensor) -> tuple:
        total = cross_entropy(logits_BTV, batch)
        return total, batch.mask.sum().int(), total.detach().clone()

    def _apply_gradients(self, loss: LossSum, learning_rate: float) -> StepStats:
        """Clip by the global norm and step; where anything is not finite, leave the weights as they were."""
        found_inf = self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if found_inf or not np.isfinite(norm) or not np.isfinite(loss.total):
            return StepStats(loss, norm, skipped=True)
        if norm > self._clip_grad:
            grads = [parameter.grad for parameter in self._optimizer.get_parameters() if parameter.grad is not None]
            torch._foreach_mul_(grads, self._clip_grad / (norm + 1e-6))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step_with_ready_grads()
        return StepStats(loss, norm, skipped=False)

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """See `Engine.evaluate`."""
        own = score(self._model, batches, vocabulary_size=self._vocabulary_size)
        return self._reduce(torch.tensor(own.total, dtype=torch.float64, device=self._device), own.tokens)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`: under bf16 the optimizer's fp32 main weights, from which the bf16 ones are rounded."""
        return {
            name: self._to_disk(name, getattr(parameter, "main_param", parameter))
            for name, parameter in gpt.named_weights(self._model)
        }

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """See `Engine.optimizer_state`. Names are `exp_avg/WEIGHT`, `exp_avg_sq/WEIGHT`, and `step` once for all."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in gpt.named_weights(self._model):
            own = self._optimizer.optimizer.state[getattr(parameter, "main_param", parameter)]
            if not own:  # no step has been made yet
                continue
            state["step"] = torch.as_tensor(own["step"], dtype=torch.float32).cpu().clone()
            state.update({f"{moment}/{name}": self._to_disk(name, own[moment]) for moment in _MOMENTS})
        return state

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor], optimizer_state: Mapping[str, torch.Tensor] | None) -> None:
        """See `Engine.load`."""
        gpt.load_weights(self._model, weights, vocabulary_size=self._vocabulary_size)
        for name, parameter in gpt.named_weights(self._model):
            main = getattr(parameter, "main_param", parameter)
            self._own_rows(name, main).copy_(weights[name])
            if optimizer_state:
                self._optimizer.optimizer.state[main] = self._moments_of(name, main, optimizer_state)

    def _moments_of(self, name: str, main: torch.Tensor, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = {"step": state["step"].clone()}
        for moment in _MOMENTS:
            if f"{moment}/{name}" not in state:
                raise CheckpointError(f"the optimizer's state lacks {moment} of {name}: it is of another model")
            own[moment] = torch.zeros_like(main)
            self._own_rows(name, own[moment]).copy_(state[f"{moment}/{name}"])
        return own

    def _own_rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return gpt.unpad(name, tensor, vocabulary_size=self._vocabulary_size)

    def _to_disk(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return self._own_rows(name, tensor.detach()).float().cpu().clone()

    def _micro_batches(self, batch: Batch) -> Iterator[DeviceBatch]:
        for start in range(0, len(batch.tokens), self._micro_batch_size):
            rows = slice(start, start + self._micro_batch_size)
            parts = (torch.from_numpy(part[rows]).to(self._device, non_blocking=True) for part in batch)
            yield DeviceBatch(*parts)

    def _reduce(self, total: torch.Tensor, count: int) -> LossSum:
        sums = torch.stack([total, torch.tensor(float(count), dtype=torch.float64, device=self._device)])
        dist.all_reduce(sums, group=self._group)
        return LossSum(float(sums[0]), int(sums[1]))


def _build_optimizer(model: torch.nn.Module, settings: Optimizer, *, bf16: bool) -> MegatronOptimizer:
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=0.0,  # `_apply_gradients` clips: a step that is not finite must be seen before it is made
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    with cuda_type_names():
        return get_megatron_optimizer(config, [model])
