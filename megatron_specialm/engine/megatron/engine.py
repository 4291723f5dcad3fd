"""The Megatron engine: Megatron-Core's parallelism, schedules and mixed-precision optimizer around one model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
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

from megatron_specialm.base.errors import CheckpointError, ConfigError, TrainingError
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.megatron.optimizer import build_optimizer
from megatron_specialm.engine.megatron.shards import OptimizerShard, gather_whole, keep_original, local_shard, shard_of
from megatron_specialm.engine.protocol import LossSum, StepStats
from megatron_specialm.estimate.setup import Passes
from megatron_specialm.model.gpt import Gpt, LocalParameter, forward
from megatron_specialm.model.kernels import live_kernels
from megatron_specialm.train.losses import TEACHER_LOGITS, DeviceBatch, Objective, VocabularyShare, cross_entropy

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MegatronEngine:
    """A model in any layout of `ParallelConfig`, with its optimizer.

    A `teacher` in the same layout, of the same vocabulary and of any shape, reads along in training: its logits are a
    note of every micro-batch. It is never trained.

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
        self._data_parallel_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._vocabulary = _vocabulary_share(model)
        self._config = model.chunks[0].config
        self._chunks = [_data_parallel(chunk, parallel) for chunk in model.chunks]
        self._config.finalize_model_grads_func = self._finalize_gradients
        no_sync = [chunk.no_sync for chunk in self._chunks]
        self._config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._optimizer = build_optimizer(self._chunks, model, optimizer, parallel)
        self._has_moments = False
        self._forward_backward = get_forward_backward_func()
        self.passes = Passes()
        self._variants = 0  # that the micro-batches made last compute with

    def train_step(self, batch: Batch, *, learning_rate: float) -> StepStats:
        """See `Engine.train_step`."""
        return self.apply_gradients(self.accumulate_gradients(batch), learning_rate=learning_rate)

    def accumulate_gradients(self, batch: Batch) -> LossSum:
        """The first half of a step: forward and backward passes, gradients summed over all processes."""
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        sums = self._run(self._micro_batches([batch]), forward_only=False)
        return self._reduce(sums, int(batch.mask.sum()))

    def apply_gradients(self, loss: LossSum, *, learning_rate: float) -> StepStats:
        """The second half: clip by the global norm and step; where anything is not finite, leave the weights alone."""
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
        self._has_moments = True
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
        while group := list(islice(waiting, 4 * stages)):  # enough at a time to keep all stages busy
            tokens += sum(int(batch.mask.sum(dtype=np.float64)) for batch in group)  # weights are large: exactly
            empty = group[0]._replace(mask=np.zeros_like(group[0].mask))
            group += [empty] * (-len(group) % stages)  # an interleaved pipeline takes multiples of its stages
            sums += self._run(self._micro_batches(group), forward_only=True)
        return self._reduce(sums, tokens)

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`: under bf16 the optimizer's fp32 main weights, from which the bf16 ones are rounded."""
        return self._collect(lambda _, share: share.main)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """See `Engine.optimizer_state`. Names are `exp_avg/WEIGHT`, `exp_avg_sq/WEIGHT`, and `step` once for all."""
        if not self._has_moments:
            return {}
        state: dict[str, torch.Tensor] = {}
        for moment in _MOMENTS:
            found = self._collect(partial(self._moment, moment), trained_only=True)
            state.update({f"{moment}/{name}": tensor for name, tensor in found.items()})
        if dist.get_rank() == 0:
            state["step"] = torch.tensor(float(self._steps()))
        return state

    def kernels(self) -> str:
        """Which fused kernels run here, in one line."""
        return live_kernels(self._model, self._optimizer.optimizer)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The canonical gradients of the last step, dealt out as `weights` are. Clipping may have scaled them."""
        return self._collect(
            lambda weight, share: _gradient(weight.parameter).flatten()[share.elements], trained_only=True
        )

    def norm_squares(self) -> dict[str, float]:
        """By weight, the sum of squares with which this process's gradients entered the norm of the last step, as
        clipped. Over all processes it must be that of the canonical gradient: nothing left out or counted twice. Copies
        that all hold all of the optimizer's state each take a norm of their own; the first one's is reported."""
        counted = {gradient.data_ptr() for gradient in self._optimizer.get_main_grads_for_grad_norm()}
        squares: dict[str, float] = {}
        for weight, share in self._shards():
            gradient = None if share.main is None else share.main.grad
            another_norm = share.group is None and self._data_parallel_group.rank() > 0
            if gradient is not None and gradient.data_ptr() in counted and not another_norm:
                squares[weight.name] = float(gradient.double().square().sum())
        return squares

    def load(self, weights: Mapping[str, torch.Tensor], optimizer_state: Mapping[str, torch.Tensor] | None) -> None:
        """See `Engine.load`."""
        self._model.load(weights)
        with torch.no_grad():
            for weight, share in self._shards():
                if not weight.parameter.requires_grad:
                    keep_original(weight.parameter, local_shard(weight, share, weights[weight.name]))
                elif share.main is not None:
                    share.main.view(-1).copy_(local_shard(weight, share, weights[weight.name]))
                    if optimizer_state:
                        self._load_moments(weight, share, share.main, optimizer_state)
        if optimizer_state:
            if self._counts_by_group:
                for group in self._optimizer.param_groups:
                    group["step"] = int(optimizer_state["step"])
            self._has_moments = True

    def _load_moments(
        self, weight: LocalParameter, share: OptimizerShard, main: torch.Tensor, state: Mapping[str, torch.Tensor]
    ) -> None:
        own = self._optimizer.optimizer.state[main] = {} if self._counts_by_group else {"step": state["step"].clone()}
        for moment in _MOMENTS:
            name = f"{moment}/{weight.name}"
            if name not in state:
                raise CheckpointError(f"the optimizer's state lacks {name}: it is of another model")
            own[moment] = local_shard(weight, share, state[name]).to(main).view(main.shape).clone()

    def _moment(self, moment: str, _: LocalParameter, share: OptimizerShard) -> torch.Tensor | None:
        return self._optimizer.optimizer.state[share.main][moment] if share.main is not None else None

    def _steps(self) -> float:
        """How many updates the moments are of."""
        if self._counts_by_group:  # but not for a group of which this process holds nothing
            return float(max(group.get("step", 0) for group in self._optimizer.param_groups))
        return float(next(iter(self._optimizer.optimizer.state.values()))["step"])

    @property
    def _counts_by_group(self) -> bool:
        """Whether Adam counts its updates per group, as Transformer Engine's and apex's do; PyTorch's does per parameter."""
        return not isinstance(self._optimizer.optimizer, torch.optim.AdamW)

    def _shards(self) -> Iterator[tuple[LocalParameter, OptimizerShard]]:
        for weight in self._model.weights():
            yield weight, shard_of(self._optimizer, weight.parameter)

    def _collect(
        self, value: Callable[[LocalParameter, OptimizerShard], torch.Tensor | None], *, trained_only: bool = False
    ) -> dict[str, torch.Tensor]:
        """Whole canonical tensors, each on one of the processes that hold parts of it, in turns."""
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        found = {}
        for turn, (weight, share) in enumerate(self._shards()):
            if trained_only and not weight.parameter.requires_grad:
                continue
            whole = gather_whole(weight, share, value(weight, share))
            copy = getattr(weight.parameter, "shared", False)  # the embedding's, on the last pipeline stage
            if turn % group.size() == group.rank() and not copy:
                found[weight.name] = whole.cpu().clone()
        return found

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
        self.passes = self.passes.after(slots, self._variants, forward_only=forward_only)
        return sums

    def _forward_step(self, micro_batches: Iterator[DeviceBatch], chunk: DistributedDataParallel) -> tuple:
        batch = next(micro_batches)
        if self._teacher is not None and chunk.training:
            batch = _with_teacher_logits(self._teacher, batch)
        if (derived := self._model.derived) is None:
            output = forward(chunk, batch.tokens)
        else:
            use = partial(derived.use, self._chunks.index(chunk), batch.variant)
            use()
            output = forward(chunk, batch.tokens)
            if output.requires_grad:  # what is recomputed in its backward pass must see the same weights
                output.register_hook(lambda _: use())
        objective = self._objective if chunk.training else cross_entropy
        return output, partial(self._loss, batch, objective)

    def _loss(self, batch: DeviceBatch, objective: Objective, logits_TBV: torch.Tensor) -> tuple:
        total = objective(logits_TBV, batch, share=self._vocabulary)
        return total, batch.mask.sum().int(), total.detach().clone()

    def _finalize_gradients(self, chunks: list[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
        """What Megatron-Core's schedule calls when all backward passes are done."""
        if self._model.derived is not None:
            self._model.derived.backward_mixtures()
        finalize_model_grads(chunks, *args, **kwargs)

    def _micro_batches(self, batches: list[Batch]) -> list[DeviceBatch]:
        """The micro-batches of some batches. Of derived weights, all variants that they use are computed here."""
        found, variants = [], ExpertMixtures()
        for batch in batches:
            # The last batch of a set may be short: rows that do not count fill it up, as all stages expect one size.
            batch = batch.padded(-len(batch.tokens) % self._micro_batch_size)
            for start in range(0, len(batch.tokens), self._micro_batch_size):
                part = batch.rows(slice(start, start + self._micro_batch_size))
                variant = variants.number(part.notes.get(MIXTURE))
                found.append(self._on_device(part, variant))
        if self._model.derived is not None:
            self._finish_gathering()
            self._variants = len(variants.table())
            self._model.derived.materialize(variants.table().to(self._model.device))
        return found

    def _finish_gathering(self) -> None:
        """Have all parameters as the last step left them; all copies call this at once. Where communication overlaps, they
        gather what each has updated as late as the forward pass of the module that holds it: too late for weights that are
        derived before any, and a wait without end for a copy whose fellow makes no pass."""
        if self._parallel.overlap_communication and self._parallel.distributed_optimizer:
            for chunk in self._chunks:
                for group in reversed(
                    chunk.bucket_groups
                ):  # in the order in which each starts the next one's gathering
                    group.finish_param_sync()

    def _on_device(self, batch: Batch, variant: int) -> DeviceBatch:
        parts = {"tokens": batch.tokens, "targets": batch.targets, "mask": batch.mask}
        parts |= {name: note for name, note in batch.notes.items() if name != MIXTURE}
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(part)).to(self._model.device, non_blocking=True)
            for name, part in parts.items()
        }
        tensors = get_batch_on_this_cp_rank(tensors)
        tokens, targets, mask = (tensors.pop(name) for name in ("tokens", "targets", "mask"))
        return DeviceBatch(tokens, targets, mask, variant, tensors)

    def _reduce(self, sums: list[torch.Tensor], count: int) -> LossSum:
        """Over the copies; then from the last stage, which alone has the loss, to the others."""
        total = torch.stack(sums).double().sum() if sums else torch.zeros((), dtype=torch.float64)
        counts = torch.tensor(float(count), dtype=torch.float64)
        both = torch.stack([total.to(self._model.device), counts.to(self._model.device)])
        dist.all_reduce(both[:1], group=self._data_parallel_group)
        dist.all_reduce(both[:1], group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(both[1:], group=parallel_state.get_data_parallel_group())
        return LossSum(float(both[0]), int(both[1]))


class ExpertMixtures:
    """The different mixtures of experts that micro-batches use, numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._mixtures: list[np.ndarray] = []

    def number(self, mixture_BK: np.ndarray | None) -> int:
        """The number of a micro-batch's mixture; without mixtures there is one variant.

        Raises:
            TrainingError: its windows do not share one. (Those that only fill it up have all zeros, and do not count.)
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
    """A teacher that can read along, in evaluation mode."""
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
    """With the teacher's logits of this process's share of the vocabulary."""
    (whole,) = teacher.chunks
    logits_BTV = forward(whole, batch.tokens).transpose(0, 1)
    return batch._replace(notes={**batch.notes, TEACHER_LOGITS: logits_BTV})


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Where Megatron-Core sums a parameter's gradient: a part of a buffer, in fp32."""
    return parameter.main_grad  # type: ignore[attr-defined]


def _vocabulary_share(model: Gpt) -> VocabularyShare | None:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return None
    padded = model.specs["embedding.word_embeddings.weight"].padded
    return VocabularyShare(group.rank() * padded // group.size(), group)


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
