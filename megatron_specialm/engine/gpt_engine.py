"""What the engines of a `Gpt` have in common: micro-batches, losses, a teacher beside the model, canonical state."""

from megatron_specialm.engine import process_groups  # first: it imports Megatron-Core

# isort: split

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_specialm.base.errors import ConfigError, TrainingError
from megatron_specialm.checkpoint.slices import SavedTensors
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.parallel import Layout
from megatron_specialm.data.packing import MicroBatches
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.gates import Gates
from megatron_specialm.engine.objective import TEACHER_LOGITS, DeviceBatch, Objective, VocabularyShard, cross_entropy
from megatron_specialm.engine.protocol import GateStatistics, LossSum, StepStats
from megatron_specialm.engine.shards import ShardedOptimizer, data_parallel_group
from megatron_specialm.engine.state import EngineState
from megatron_specialm.estimate.flops import keys_saved
from megatron_specialm.estimate.setup import FP8_MULTIPLE, Passes, Setup
from megatron_specialm.model.gpt import Gpt, forward
from megatron_specialm.model.kernels import live_kernels
from megatron_specialm.model.moe import MegatronExperts, RoutedBuilder
from megatron_specialm.model.weights import Sliceable

_Loss = Callable[[torch.Tensor], torch.Tensor]  # logits (T, B, V) of this process's shard -> a scalar in fp32


class GptEngine:
    """A model in a layout, with its optimizer: what does not depend on whose optimizer it is.

    A `teacher`, in the same layout, of the same vocabulary and of any shape, runs on every micro-batch in training: its logits
    are an extra input of the objective. It is never trained.

    Raises:
        ConfigError: a teacher under pipeline parallelism, or of another vocabulary.
    """

    def __init__(
        self,
        model: Gpt,
        *,
        parallel: Layout,
        micro_batch_size: int,
        packing: Packing,
        objective: Objective,
        teacher: Gpt | None,
    ) -> None:
        self._micro_batch_size = micro_batch_size
        self._context_parallel = parallel.context_parallel
        config = model.chunks[0].config
        self._cut = MicroBatches(
            packing,
            micro_batch_size,
            multiple=(parallel.tensor_parallel if parallel.sequence_parallel else 1)
            * (FP8_MULTIPLE if config.fp8 else 1),
            stages=parallel.pipeline_parallel,
            interleaved=parallel.virtual_pipeline > 1,
            by_expert=model.config.projection is not None,
        )
        self._model = model
        self._objective = objective
        self._teacher = None if teacher is None else _checked(teacher, model, parallel)
        self._data_parallel_group = data_parallel_group()
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel = parallel_state.get_data_parallel_world_size()
        self.device_name = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
        self._vocabulary = _vocabulary_shard(model)
        self._gates = Gates(model)
        self.passes = Passes()
        self._mixture_count = 0  # of the last batch's micro-batches

    def _keep_state_of(self, shards: ShardedOptimizer, adam: torch.optim.Optimizer) -> None:
        """To be called by an engine when it has its optimizer."""
        self._adam = adam
        self._state = EngineState(self._model, shards)

    def train_step(self, batch: Batch, *, learning_rate: float) -> StepStats:
        """See `Engine.train_step`."""
        return self.apply_gradients(self.accumulate_gradients(batch), learning_rate=learning_rate)

    def accumulate_gradients(self, batch: Batch) -> LossSum:
        """See `Engine.accumulate_gradients`."""
        raise NotImplementedError

    def apply_gradients(self, loss: LossSum, *, learning_rate: float) -> StepStats:
        """See `Engine.apply_gradients`."""
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """See `Engine.weights`."""
        return self._state.weights()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """See `Engine.optimizer_state`."""
        return self._state.optimizer_state()

    def begin_copy(self) -> Future[SavedTensors]:
        """See `Engine.begin_copy`."""
        return self._state.begin_copy()

    def gate_statistics(self) -> list[GateStatistics]:
        """See `Engine.gate_statistics`."""
        return self._gates.statistics()

    def kernels(self) -> str:
        """See `Engine.kernels`."""
        return live_kernels(self._model, self._adam)

    def gradients(self) -> dict[str, torch.Tensor]:
        """See `Engine.gradients`."""
        return self._state.gradients()

    def limit_collectives(self, seconds: float) -> None:
        """See `Engine.limit_collectives`."""
        process_groups.limit_collectives(seconds)

    def load(self, weights: Mapping[str, Sliceable], optimizer_state: Mapping[str, Sliceable] | None) -> None:
        """See `Engine.load`."""
        self._state.load(weights, optimizer_state)

    def _forward(self, chunk: torch.nn.Module, number: int, batch: DeviceBatch) -> tuple[torch.Tensor, _Loss]:
        """A chunk's forward pass on a micro-batch: its output, and what makes of the last chunk's the loss, a sum over tokens.

        Args:
            chunk: as the engine has wrapped it.
            number: of the chunk in the model.
        """
        if self._teacher is not None and chunk.training:
            batch = _with_teacher_logits(self._teacher, batch)
        if (derived := self._model.derived) is None:
            output = forward(chunk, batch.tokens, _routing(self._model, batch), lengths=batch.lengths)
        else:
            bind = partial(derived.bind, number, batch.mixture)
            bind()
            output = forward(chunk, batch.tokens, _routing(self._model, batch), lengths=batch.lengths)
            if output.requires_grad:  # activations that the backward pass recomputes need the same weights
                output.register_hook(lambda _: bind())
        objective = self._objective if chunk.training else cross_entropy
        return output, partial(objective, batch=batch, shard=self._vocabulary)

    def _micro_batches(self, batches: list[Batch], *, jointly: bool) -> list[DeviceBatch]:
        """The micro-batches of some batches. Derived weights of all mixtures that they compute with are computed here.

        Args:
            jointly: all copies call this at once, and make equally many passes of one size.
        """
        parts = self._cut.of(batches, self._largest_of_copies if jointly else None)
        found = [self._on_device(part) for part in parts]
        if self._model.derived is not None:
            mixtures = ExpertMixtures()
            numbers = [mixtures.number(part.extra_inputs.get(MIXTURE)) for part in parts]
            found = [batch._replace(mixture=number) for batch, number in zip(found, numbers, strict=True)]
            self._finish_gathering()
            self._mixture_count = len(mixtures.table())
            self._model.derived.materialize(mixtures.table().to(self._model.device))
        return found

    def _largest_of_copies(self, *values: int) -> tuple[int, ...]:
        """Of each value the largest that a copy has."""
        largest = torch.tensor(values, device=self._model.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self._data_parallel_group)
        return tuple(largest.tolist())

    def _finish_gathering(self) -> None:
        """Wait until all parameters are as the last step left them. All copies call this at once."""

    def _on_device(self, batch: Batch) -> DeviceBatch:
        parts = {"tokens": batch.tokens, "targets": batch.targets, "mask": batch.mask}
        parts |= {name: value for name, value in batch.extra_inputs.items() if name != MIXTURE}
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(part)).to(self._model.device, non_blocking=True)
            for name, part in parts.items()
        }
        tensors = get_batch_on_this_cp_rank(tensors)
        tokens, targets, mask = (tensors.pop(name) for name in ("tokens", "targets", "mask"))
        experts = self._experts_of(batch)
        return DeviceBatch(tokens, targets, mask, experts=experts, extra_inputs=tensors, lengths=batch.lengths)

    def _experts_of(self, batch: Batch) -> torch.Tensor | None:
        """The experts of a batch's windows, or of a packed batch's tokens; None for a model that does not route by cluster.

        Raises:
            TrainingError: a window that counts has no expert or several.
        """
        moe = self._model.config.moe
        if moe is None or not moe.by_cluster:
            return None
        lengths = batch.lengths
        windows = 1 if lengths is None else len(lengths)
        mixture_BWE = batch.extra_inputs.get(MIXTURE, np.zeros((len(batch.mask) * windows, moe.counts[0]), np.float32))
        experts_BTE = (
            mixture_BWE[:, None] == 1 if lengths is None else np.repeat(mixture_BWE == 1, lengths, axis=0)[None]
        )
        if not (experts_BTE.any(2) | (batch.mask == 0)).all():
            raise TrainingError("a window comes without its expert: an MoE that routes by cluster takes one for each")
        return torch.from_numpy(experts_BTE).to(self._model.device, non_blocking=True)

    def _count(self, micro_batches: list[DeviceBatch], *, forward_only: bool) -> None:
        """Add these to `passes`, as if every copy had made them: `_reduce` corrects that."""
        slots = saved = 0
        for batch in micro_batches:
            rows, positions = batch.tokens.shape
            lengths = batch.lengths or [positions * self._context_parallel] * rows
            slots += sum(lengths)
            saved += keys_saved(lengths, self._model.context_length)
        own = Passes().after(slots, self._mixture_count, saved=saved, forward_only=forward_only)
        self.passes = self.passes.plus(own, times=self.data_parallel)

    def _reduce(self, sums: list[torch.Tensor], *, tokens: int, before: Passes) -> LossSum:
        """Over the copies; then from the last stage, which alone has the loss, to the others. `passes` become those that the
        copies have made: packed windows may differ in number and length.

        Args:
            sums: of this process's micro-batches.
            tokens: of this copy.
            before: `passes` before these.
        """
        own = self.passes.plus(before, times=-1)
        total = torch.stack(sums).double().sum() if sums else torch.zeros((), dtype=torch.float64)
        counts = torch.tensor([tokens, *own], dtype=torch.float64)
        both = torch.cat([total[None].to(self._model.device), counts.to(self._model.device)])
        dist.all_reduce(both[:1], group=self._data_parallel_group)
        dist.all_reduce(both[:1], group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(both[1:], group=parallel_state.get_data_parallel_group())
        total_sum, all_tokens, *counted = both.tolist()  # one transfer from the device
        made = Passes(*(int(count) // self.data_parallel for count in counted))
        self.passes = before.plus(made)
        return LossSum(
            total_sum, int(all_tokens), made.trained + made.evaluated, made.trained_saved + made.evaluated_saved
        )


def build_models(
    setup: Setup,
    initialize: Callable[[Gpt], object],
    teacher_weights: Mapping[str, torch.Tensor] | None,
    *,
    experts: RoutedBuilder = MegatronExperts,
) -> tuple[Gpt, Gpt | None]:
    """A setup's model with its first weights, and its teacher if it has one. See `engine/open.py`.

    Args:
        experts: builds the routed experts of their MoE layers.
    """
    model, teacher = _build(setup, setup.model, experts), None
    initialize(model)
    if setup.teacher is not None:
        assert teacher_weights is not None
        teacher = _build(setup, setup.teacher, experts)
        teacher.load(teacher_weights)
    return model, teacher


def _build(setup: Setup, shape: ModelConfig, experts: RoutedBuilder) -> Gpt:
    return Gpt(
        shape,
        vocabulary_size=setup.vocabulary_size,
        context_length=setup.context_length,
        precision=setup.precision,
        fp8=setup.fp8,
        parallel=setup.parallel,
        experts=experts,
    )


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


def _checked(teacher: Gpt, model: Gpt, parallel: Layout) -> Gpt:
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
    logits_BTV = forward(whole, batch.tokens, _routing(teacher, batch), lengths=batch.lengths).transpose(0, 1)
    return batch._replace(extra_inputs={**batch.extra_inputs, TEACHER_LOGITS: logits_BTV})


def _routing(model: Gpt, batch: DeviceBatch) -> torch.Tensor | None:
    """What the routers of an MoE model get (`model/gpt.py`, `forward`). No expert computes the tokens whose targets do not
    count, at the end of their windows."""
    if model.config.moe is None:
        return None
    if batch.experts is None:
        return batch.mask == 0
    return (batch.mask != 0)[:, :, None] & batch.experts


def _vocabulary_shard(model: Gpt) -> VocabularyShard | None:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return None
    padded = model.specs["embedding.word_embeddings.weight"].padded
    return VocabularyShard(group.rank() * padded // group.size(), group)
