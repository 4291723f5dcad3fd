"""The Megatron engine: Megatron-Core's parallelism, schedules and mixed-precision optimizer around one model."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_specialm.config.packing import Packing
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.gpt_engine import GptEngine
from megatron_specialm.engine.megatron.optimizer import build_optimizer
from megatron_specialm.engine.megatron.shards import MegatronShards
from megatron_specialm.engine.objective import DeviceBatch, Objective, cross_entropy
from megatron_specialm.engine.protocol import LossSum, StepStats
from megatron_specialm.engine.shards import copies_group
from megatron_specialm.model.gpt import Gpt


class MegatronEngine(GptEngine):
    """A model in any layout of `ParallelConfig`, with its optimizer. For the teacher and errors see `GptEngine`."""

    def __init__(
        self,
        model: Gpt,
        *,
        parallel: ParallelConfig,
        optimizer: Adam,
        micro_batch_size: int,
        packing: Packing = "none",
        objective: Objective = cross_entropy,
        teacher: Gpt | None = None,
    ) -> None:
        super().__init__(
            model,
            parallel=parallel,
            micro_batch_size=micro_batch_size,
            packing=packing,
            objective=objective,
            teacher=teacher,
        )
        self._parallel = parallel
        self._clip_grad = optimizer.clip_grad
        self._config = model.chunks[0].config
        self._chunks = [_data_parallel(chunk, parallel) for chunk in model.chunks]
        self._config.finalize_model_grads_func = self._finalize_gradients
        no_sync = [chunk.no_sync for chunk in self._chunks]
        self._config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._optimizer = build_optimizer(self._chunks, model, optimizer, parallel)
        self._keep_state_of(MegatronShards(self._optimizer), self._optimizer.chained_optimizers[0].optimizer)
        self._forward_backward = get_forward_backward_func()

    def accumulate_gradients(self, batch: Batch) -> LossSum:
        """See `Engine.accumulate_gradients`."""
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._gates.begin_step()
        self._optimizer.zero_grad()
        before = self.passes
        sums = self._run([batch], forward_only=False)
        return self._reduce(sums, tokens=int(batch.mask.sum()), before=before)

    def apply_gradients(self, loss: LossSum, *, learning_rate: float) -> StepStats:
        """See `Engine.apply_gradients`."""
        self._state.finish_copy()
        found_inf = self._optimizer.prepare_grads()
        norm = float(self._optimizer.get_grad_norm())
        if found_inf or not np.isfinite(norm) or not np.isfinite(loss.total):
            return StepStats(loss, norm, skipped=True)
        if norm > self._clip_grad:
            trained = [main for part in self._optimizer.chained_optimizers for main in part.get_parameters()]
            grads = [main.grad for main in trained if main.grad is not None]
            torch._foreach_mul_(grads, self._clip_grad / (norm + 1e-6))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step_with_ready_grads()
        self._state.has_moments = True
        self._gates.end_step()
        return StepStats(loss, norm, skipped=False)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """See `Engine.evaluate`."""
        self._finish_gathering()  # by all copies, before passes that one without windows does not make
        for chunk in self._chunks:
            chunk.eval()
        sums: list[torch.Tensor] = []
        tokens, before = 0, self.passes
        waiting, at_once = iter(batches), 4 * self._parallel.pipeline_parallel  # enough to keep all stages busy
        while group := self._filled_up(list(islice(waiting, at_once))):
            tokens += sum(int(batch.mask.sum(dtype=np.float64)) for batch in group)  # weights are large: exactly
            sums += self._run(group, forward_only=True)
        return self._reduce(sums, tokens=tokens, before=before)

    def norm_squares(self) -> dict[str, float]:
        """See `Engine.norm_squares`. Without the distributed optimizer each copy takes a norm of its own; the first one's is
        reported."""
        counted = {
            gradient.data_ptr()
            for part in self._optimizer.chained_optimizers
            for gradient in part.get_main_grads_for_grad_norm()
        }
        squares: dict[str, float] = {}
        for weight, shard in self._state.shards():
            gradient = None if shard.main is None else shard.main.grad
            another_norm = not shard.is_split and copies_group(weight.spec).rank() > 0
            if gradient is not None and gradient.data_ptr() in counted and not another_norm:
                squares[weight.name] = squares.get(weight.name, 0.0) + float(gradient.double().square().sum())
        return squares

    def _run(self, batches: list[Batch], *, forward_only: bool) -> list[torch.Tensor]:
        """Megatron-Core's schedule over the micro-batches of some batches: the loss sums, on the last pipeline stage only."""
        micro_batches = self._micro_batches(batches, jointly=self._parallel.expert_parallel > 1)
        sums = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.shape[1] * self._parallel.context_parallel,
            micro_batch_size=len(micro_batches[0].tokens),
            forward_only=forward_only,
        )
        self._count(micro_batches, forward_only=forward_only)
        return sums  # type: ignore[no-any-return]

    def _forward_step(self, micro_batches: Iterator[DeviceBatch], chunk: DistributedDataParallel) -> tuple:
        batch = next(micro_batches)
        output, loss = self._forward(chunk, self._chunks.index(chunk), batch)
        return output, partial(self._loss, batch, loss)

    def _loss(self, batch: DeviceBatch, loss: Callable, logits_TBV: torch.Tensor) -> tuple:
        total = loss(logits_TBV)
        return total, batch.mask.sum().int(), total.detach().clone()

    def _finalize_gradients(self, chunks: list[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
        """Sum gradients over data-parallel ranks and divide them by the number of tokens in the global batch (Megatron-Core's
        finalize_model_grads). Its schedule calls this when all backward passes are done."""
        if self._model.derived is not None:
            self._model.derived.backward()
        finalize_model_grads(chunks, *args, **kwargs)

    def _filled_up(self, batches: list[Batch]) -> list[Batch]:
        """With batches that do not count, as an interleaved pipeline takes multiples of its stages. Under expert parallelism
        all copies make as many passes: each pass needs the experts of all."""
        stages = self._parallel.pipeline_parallel
        if self._parallel.expert_parallel == 1:
            return batches + [_without_tokens(batches[0])] * (-len(batches) % stages) if batches else []
        own = sum(-(-len(batch.tokens) // self._micro_batch_size) for batch in batches)
        most, positions = self._largest_of_copies(own, batches[0].tokens.shape[1] if batches else 0)
        most += -most % stages
        empty = np.zeros((self._micro_batch_size, positions), np.int64)
        return batches + [Batch(empty, empty, empty.astype(np.float32))] * (most - own)

    def _finish_gathering(self) -> None:
        """See `GptEngine`. With overlapped communication the copies gather a module's parameters only when its forward pass
        begins: too late for weights that are derived before any, and a deadlock with a copy that makes no forward pass."""
        if self._parallel.overlap_communication and self._parallel.distributed_optimizer:
            for chunk in self._chunks:
                for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
                    for group in reversed(groups):  # in the order in which each starts the next one's gathering
                        group.finish_param_sync()


def _without_tokens(batch: Batch) -> Batch:
    return batch._replace(mask=np.zeros_like(batch.mask))


def _data_parallel(chunk: GPTModel, parallel: ParallelConfig) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_communication,
        overlap_param_gather=parallel.overlap_communication and parallel.distributed_optimizer,
    )
    inner = Float16Module(chunk.config, chunk) if chunk.config.bf16 else chunk
    # Megatron-LM makes one bucket group of each chunk behind the first. Of two precisions in a group, gloo gathers garbage.
    return DistributedDataParallel(chunk.config, settings, inner)
