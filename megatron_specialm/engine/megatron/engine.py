"""The Megatron engine: Megatron-Core's parallelism, schedules and mixed-precision optimizer around one model."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_specialm.base.errors import ConfigError, TrainingError
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.gates import Gates
from megatron_specialm.engine.megatron import process_groups
from megatron_specialm.engine.megatron.optimizer import build_optimizer
from megatron_specialm.engine.megatron.shards import copies_group, data_parallel_group
from megatron_specialm.engine.megatron.state import EngineState
from megatron_specialm.engine.objective import TEACHER_LOGITS, DeviceBatch, Objective, VocabularyShard, cross_entropy
from megatron_specialm.engine.protocol import GateStatistics, LossSum, StepStats
from megatron_specialm.estimate.setup import Passes
from megatron_specialm.model.gpt import Gpt, forward
from megatron_specialm.model.kernels import live_kernels
from megatron_specialm.model.weights import Sliceable


class MegatronEngine:
    """A model in any layout of `ParallelConfig`, with its optimizer.

    A `teacher`, in the same layout, of the same vocabulary and of any shape, runs on every micro-batch in training: its logits
    are an extra input of the objective. It is never trained.

    Raises:
        ConfigError: a teacher under pipeline parallelism, or of another vocabulary.
    """

    def __init__(
        self,
        model: Gpt,
        *,
        parallel: ParallelConfig,
        optimizer: Adam,
        micro_batch_size: int,
        objective: Objective = cross_entropy,
        teacher: Gpt | None = None,
    ) -> None:
        self._parallel = parallel
        self._micro_batch_size = micro_batch_size
        self._clip_grad = optimizer.clip_grad
        self._model = model
        self._objective = objective
        self._teacher = None if teacher is None else _checked(teacher, model, parallel)
        self._data_parallel_group = data_parallel_group()
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel = parallel_state.get_data_parallel_world_size()
        self.device_name = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
        self._vocabulary = _vocabulary_shard(model)
        self._config = model.chunks[0].config
        self._chunks = [_data_parallel(chunk, parallel) for chunk in model.chunks]
        self._config.finalize_model_grads_func = self._finalize_gradients
        no_sync = [chunk.no_sync for chunk in self._chunks]
        self._config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._optimizer = build_optimizer(self._chunks, model, optimizer, parallel)
        self._state = EngineState(model, self._optimizer)
        self._gates = Gates(model)
        self._forward_backward = get_forward_backward_func()
        self.passes = Passes()
        self._mixture_count = 0  # of the last batch's micro-batches

    def train_step(self, batch: Batch, *, learning_rate: float) -> StepStats:
        """See `Engine.train_step`."""
        return self.apply_gradients(self.accumulate_gradients(batch), learning_rate=learning_rate)

    def accumulate_gradients(self, batch: Batch) -> LossSum:
        """See `Engine.accumulate_gradients`."""
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._gates.begin_step()
        self._optimizer.zero_grad()
        sums = self._run(self._micro_batches([batch]), forward_only=False)
        return self._reduce(sums, int(batch.mask.sum()))

    def apply_gradients(self, loss: LossSum, *, learning_rate: float) -> StepStats:
        """See `Engine.apply_gradients`."""
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
        self._gates.update_biases()
        return StepStats(loss, norm, skipped=False)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """See `Engine.evaluate`."""
        self._finish_gathering()  # by all copies, before passes that one without windows does not make
        for chunk in self._chunks:
            chunk.eval()
        sums: list[torch.Tensor] = []
        tokens = 0
        stages = self._parallel.pipeline_parallel
        waiting = iter(batches)
        while group := self._with_others(list(islice(waiting, 4 * stages))):  # enough at a time to keep all stages busy
            tokens += sum(int(batch.mask.sum(dtype=np.float64)) for batch in group)  # weights are large: exactly
            empty = group[0]._replace(mask=np.zeros_like(group[0].mask))
            group += [empty] * (-len(group) % stages)  # an interleaved pipeline takes multiples of its stages
            sums += self._run(self._micro_batches(group), forward_only=True)
        return self._reduce(sums, tokens)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`."""
        return self._state.weights()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """See `Engine.optimizer_state`."""
        return self._state.optimizer_state()

    def gate_statistics(self) -> list[GateStatistics]:
        """See `Engine.gate_statistics`."""
        return self._gates.statistics()

    def kernels(self) -> str:
        """See `Engine.kernels`."""
        return live_kernels(self._model, self._optimizer.chained_optimizers[0].optimizer)

    def gradients(self) -> dict[str, torch.Tensor]:
        """See `Engine.gradients`."""
        return self._state.gradients()

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

    def limit_collectives(self, seconds: float) -> None:
        """See `Engine.limit_collectives`."""
        process_groups.limit_collectives(seconds)

    def load(self, weights: Mapping[str, Sliceable], optimizer_state: Mapping[str, Sliceable] | None) -> None:
        """See `Engine.load`."""
        self._state.load(weights, optimizer_state)

    def _run(self, micro_batches: list[DeviceBatch], *, forward_only: bool) -> list[torch.Tensor]:
        """Megatron-Core's schedule over micro-batches: the loss sums, on the last pipeline stage only."""
        sums = self._forward_backward(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.shape[1] * self._parallel.context_parallel,
            micro_batch_size=self._micro_batch_size,
            forward_only=forward_only,
        )
        slots = len(micro_batches) * micro_batches[0].tokens.numel() * self._parallel.context_parallel
        self.passes = self.passes.after(slots, self._mixture_count, forward_only=forward_only)
        return sums

    def _forward_step(self, micro_batches: Iterator[DeviceBatch], chunk: DistributedDataParallel) -> tuple:
        batch = next(micro_batches)
        if self._teacher is not None and chunk.training:
            batch = _with_teacher_logits(self._teacher, batch)
        if (derived := self._model.derived) is None:
            output = forward(chunk, batch.tokens, _padding(self._model, batch))
        else:
            bind = partial(derived.bind, self._chunks.index(chunk), batch.mixture)
            bind()
            output = forward(chunk, batch.tokens, _padding(self._model, batch))
            if output.requires_grad:  # activations that the backward pass recomputes need the same weights
                output.register_hook(lambda _: bind())
        objective = self._objective if chunk.training else cross_entropy
        return output, partial(self._loss, batch, objective)

    def _loss(self, batch: DeviceBatch, objective: Objective, logits_TBV: torch.Tensor) -> tuple:
        total = objective(logits_TBV, batch, shard=self._vocabulary)
        return total, batch.mask.sum().int(), total.detach().clone()

    def _finalize_gradients(self, chunks: list[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
        """Sum gradients over data-parallel ranks and divide them by the number of tokens in the global batch (Megatron-Core's
        finalize_model_grads). Its schedule calls this when all backward passes are done."""
        if self._model.derived is not None:
            self._model.derived.backward()
        finalize_model_grads(chunks, *args, **kwargs)

    def _micro_batches(self, batches: list[Batch]) -> list[DeviceBatch]:
        """The micro-batches of some batches. Derived weights of all mixtures that they compute with are computed here."""
        found, mixtures = [], ExpertMixtures()
        for batch in batches:
            # The last batch of a set may be short: rows that do not count fill it up, as all stages expect one size.
            batch = batch.padded(-len(batch.tokens) % self._micro_batch_size)
            for start in range(0, len(batch.tokens), self._micro_batch_size):
                part = batch.rows(slice(start, start + self._micro_batch_size))
                mixture = mixtures.number(part.extra_inputs.get(MIXTURE))
                found.append(self._on_device(part, mixture))
        if self._model.derived is not None:
            self._finish_gathering()
            self._mixture_count = len(mixtures.table())
            self._model.derived.materialize(mixtures.table().to(self._model.device))
        return found

    def _with_others(self, batches: list[Batch]) -> list[Batch]:
        """Under expert parallelism, with windows that do not count, so that all copies make as many passes: each pass needs the
        experts of all."""
        if self._parallel.expert_parallel == 1:
            return batches
        own = sum(-(-len(batch.tokens) // self._micro_batch_size) for batch in batches)
        positions = batches[0].tokens.shape[1] if batches else 0
        largest = torch.tensor([own, positions], device=self._model.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self._data_parallel_group)
        most, positions = largest.tolist()
        empty = np.zeros(((most - own) * self._micro_batch_size, positions), np.int64)
        return [*batches, Batch(empty, empty, empty.astype(np.float32))] if len(empty) else batches

    def _finish_gathering(self) -> None:
        """Wait until all parameters are as the last step left them. All copies call this at once. With overlapped communication
        the copies gather the parameters of a module only when its forward pass begins: too late for weights that are derived
        before any, and a deadlock with a copy that makes no forward pass."""
        if self._parallel.overlap_communication and self._parallel.distributed_optimizer:
            for chunk in self._chunks:
                for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
                    for group in reversed(groups):  # in the order in which each starts the next one's gathering
                        group.finish_param_sync()

    def _on_device(self, batch: Batch, mixture: int) -> DeviceBatch:
        parts = {"tokens": batch.tokens, "targets": batch.targets, "mask": batch.mask}
        parts |= {name: value for name, value in batch.extra_inputs.items() if name != MIXTURE}
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(part)).to(self._model.device, non_blocking=True)
            for name, part in parts.items()
        }
        tensors = get_batch_on_this_cp_rank(tensors)
        tokens, targets, mask = (tensors.pop(name) for name in ("tokens", "targets", "mask"))
        return DeviceBatch(tokens, targets, mask, mixture, tensors)

    def _reduce(self, sums: list[torch.Tensor], count: int) -> LossSum:
        """Over the copies; then from the last stage, which alone has the loss, to the others."""
        total = torch.stack(sums).double().sum() if sums else torch.zeros((), dtype=torch.float64)
        counts = torch.tensor(float(count), dtype=torch.float64)
        both = torch.stack([total.to(self._model.device), counts.to(self._model.device)])
        dist.all_reduce(both[:1], group=self._data_parallel_group)
        dist.all_reduce(both[:1], group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(both[1:], group=parallel_state.get_data_parallel_group())
        total_sum, tokens = both.tolist()  # one transfer from the device
        return LossSum(total_sum, int(tokens))


class ExpertMixtures:
    """The different mixtures of experts that micro-batches use, numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._mixtures: list[np.ndarray] = []

    def number(self, mixture_BK: np.ndarray | None) -> int:
        """The number of a micro-batch's mixture; without mixtures it is 0.

        Raises:
            TrainingError: its windows have different mixtures. (Padding windows have all zeros, and do not count.)
        """
        mixture_K = np.ones(1, np.float32) if mixture_BK is None else mixture_BK[0]
        if mixture_BK is not None and not (real := mixture_BK[mixture_BK.any(1)] == mixture_K).all():
            raise TrainingError(
                f"a micro-batch of {len(mixture_BK)} windows has windows of different experts "
                f"({int(real.all(1).sum())} are of the first one's): batches of a projected model go by expert"
            )
        number = self._numbers.setdefault(mixture_K.tobytes(), len(self._mixtures))
        if number == len(self._mixtures):
            self._mixtures.append(mixture_K)
        return number

    def table(self) -> torch.Tensor:
        """All mixtures, (J, K)."""
        return torch.from_numpy(np.stack(self._mixtures))


def _checked(teacher: Gpt, model: Gpt, parallel: ParallelConfig) -> Gpt:
    """A teacher that can run beside the model, in evaluation mode."""
    if parallel.pipeline_parallel > 1:
        raise ConfigError(
            f"pipeline_parallel {parallel.pipeline_parallel}: a teacher beside its student runs on one stage: "
            "set pipeline_parallel to 1, or cache the teacher"
        )
    if teacher.vocabulary_size != model.vocabulary_size:
        raise ConfigError(
            f"the teacher's vocabulary has {teacher.vocabulary_size} tokens, the student's {model.vocabulary_size}: "
            "both must be trained with one tokenizer"
        )
    for chunk in teacher.chunks:  # norms are built in fp32, and the student's wrapper rounds its own
        if chunk.config.bf16:
            chunk.bfloat16()
    return teacher.train(False)


@torch.no_grad()
def _with_teacher_logits(teacher: Gpt, batch: DeviceBatch) -> DeviceBatch:
    """With the teacher's logits of this process's shard of the vocabulary."""
    (whole,) = teacher.chunks
    logits_BTV = forward(whole, batch.tokens, _padding(teacher, batch)).transpose(0, 1)
    return batch._replace(extra_inputs={**batch.extra_inputs, TEACHER_LOGITS: logits_BTV})


def _padding(model: Gpt, batch: DeviceBatch) -> torch.Tensor | None:
    """Of an MoE model, the tokens that no expert computes: those whose targets do not count, at the end of their windows."""
    return None if model.config.moe is None else batch.mask == 0


def _vocabulary_shard(model: Gpt) -> VocabularyShard | None:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return None
    padded = model.specs["embedding.word_embeddings.weight"].padded
    return VocabularyShard(group.rank() * padded // group.size(), group)


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
