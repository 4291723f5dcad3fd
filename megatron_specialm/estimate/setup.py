"""The setup of a training: model, layout, precision and batch, and what follows from them by arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_specialm.base.shapes import Count
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.parallel import Layout
from megatron_specialm.config.precision import Fp8Config, Precision
from megatron_specialm.estimate.flops import projection_flops, reading_flops

FP8_MULTIPLE = 16  # bytes: cuBLAS needs every row of an FP8 matrix to be aligned to it


class Passes(NamedTuple):
    """Passes through a model: slots (token positions, padding included) that went forward and backward, and those that
    went forward only, as in validations; how often weights were computed for them from other weights, for a mixture of
    experts, or for a base and its adapters; and the keys that attention did not read (`keys_saved`), which records of earlier
    versions lack: they count the whole context for each slot."""

    trained: Count = 0
    evaluated: Count = 0
    trained_variants: Count = 0
    evaluated_variants: Count = 0
    trained_saved: Count = 0
    evaluated_saved: Count = 0

    def after(self, slots: int, variants: int, *, saved: int, forward_only: bool) -> "Passes":
        """These and one more, over so many slots and with so many mixtures."""
        one = Passes(evaluated=slots, evaluated_variants=variants, evaluated_saved=saved)
        return self.plus(one if forward_only else Passes(slots, 0, variants, 0, saved))

    def plus(self, other: "Passes", *, times: int = 1) -> "Passes":
        """These, and `times` the others."""
        return Passes(*(own + times * more for own, more in zip(self, other, strict=True)))


@dataclass(frozen=True)
class MatrixSize:
    """A size of matrices that are split over processes: `whole / processes` on each."""

    name: str
    whole: int
    processes: int


@dataclass(frozen=True)
class Setup:
    """The setup of a train stage."""

    model: ModelConfig
    parallel: Layout
    precision: Precision
    vocabulary_size: int  # of the config; an existing tokenizer has its own
    context_length: int
    global_batch_size: int
    micro_batch_size: int
    fp8: Fp8Config | None = None
    windows_per_expert: int = 1  # consecutive windows with the same weights; more than one in a projected network
    variants: int = 0  # mixtures of experts that a step computes
    teacher: ModelConfig | None = None  # that runs beside the student
    packing: Packing = "none"

    @property
    def shard(self) -> int:
        """Windows of one micro-batch on all data-parallel ranks."""
        return self.micro_batch_size * self.parallel.data_parallel

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step and data-parallel rank."""
        return self.global_batch_size // self.shard

    @property
    def local_variants(self) -> int:
        """At most so many mixtures of experts does a data-parallel rank compute in a step: those of its groups of windows, of
        which the first and the last may be cut."""
        windows = self.global_batch_size // self.parallel.data_parallel
        groups = -(-windows // self.windows_per_expert) + (windows % self.windows_per_expert > 0)
        return min(self.variants, groups)

    @property
    def pads_packed_windows(self) -> bool:
        """Whether packed micro-batches have padding, because those of different mixtures of experts must have one length:
        pipeline stages exchange tensors of one size, and replicas of ZeRO-2 and 3 make their passes together."""
        one_length = self.parallel.pipeline_parallel > 1 or self.parallel.zero_stage >= 2
        return self.packing == "packed" and self.model.projection is not None and one_length

    @property
    def expert_tensor_parallel(self) -> int:
        """Processes over which an expert's matrices are split: Megatron-Core does not split experts that have biases."""
        return 1 if any(model.family == "neox" for model in self.moe_models) else self.parallel.tensor_parallel

    @property
    def moe_models(self) -> list[ModelConfig]:
        """Which of the model and its teacher have experts."""
        return [model for model in (self.model, self.teacher) if model is not None and model.moe is not None]

    @property
    def expert_counts(self) -> list[int]:
        """The numbers of experts that their layers have."""
        return sorted({count for model in self.moe_models if model.moe is not None for count in model.moe.counts})

    @property
    def indivisible_expert_size(self) -> int | None:
        """The first feed-forward size of MoE layers, of the model and its teacher, that the processes over which it is split
        do not divide. What stands beside the routed experts is split as in dense layers."""
        for model in self.moe_models:
            for layer in filter(model.experts_of, range(model.layers)):
                routed, *beside = (part.ffn_hidden_size for part in model.feed_forward_parts(layer))
                if routed % self.expert_tensor_parallel:
                    return routed
                if indivisible := [size for size in beside if size % self.parallel.tensor_parallel]:
                    return indivisible[0]
        return None

    @property
    def expert_ranks(self) -> int:
        """Processes of a pipeline stage that have the same part of the same experts without expert parallelism."""
        parallel = self.parallel
        return (
            parallel.data_parallel * parallel.context_parallel * parallel.tensor_parallel // self.expert_tensor_parallel
        )

    @property
    def step_flops(self) -> int:
        """An upper bound of the FLOPs of an optimizer step: all windows padded; and with fewer experts than groups of windows,
        fewer are projected."""
        return self.step_flops_of(self.global_batch_size * self.context_length)

    def step_flops_of(self, slots: int, saved: int = 0) -> int:
        """The FLOPs of an optimizer step that computes so many slots.

        Args:
            saved: keys that attention does not read in it (`keys_saved`).
        """
        return self.flops(Passes(trained=slots, trained_variants=self.variants, trained_saved=saved))

    def flops(self, passes: Passes) -> int:
        """FLOPs of passes: of the model, of a teacher that runs beside it in training, and of projections."""
        sizes = self.vocabulary_size, self.context_length
        trained = {"slots": passes.trained, "saved": passes.trained_saved}
        flops = 3 * reading_flops(self.model, *sizes, **trained)
        flops += reading_flops(self.model, *sizes, slots=passes.evaluated, saved=passes.evaluated_saved)
        if self.teacher is not None:
            flops += reading_flops(self.teacher, *sizes, **trained)
        if self.model.projection is not None:
            flops += projection_flops(self.model, passes.trained_variants)
            flops += projection_flops(self.model, passes.evaluated_variants, forward_only=True)
        return flops

    @property
    def misaligned_for_fp8(self) -> MatrixSize | None:
        """The first matrix size that is not a multiple of `FP8_MULTIPLE` on each process."""
        parallel, model = self.parallel, self.model
        tensor = parallel.tensor_parallel
        positions = parallel.context_parallel * (tensor if parallel.sequence_parallel else 1)
        sizes = (
            MatrixSize("hidden_size", model.hidden_size, tensor),
            MatrixSize("ffn_hidden_size", model.ffn_hidden_size, tensor),
            MatrixSize("query, key and value size", model.qkv_size, tensor),
            MatrixSize("micro_batch_size x context_length", self.micro_batch_size * self.context_length, positions),
        )
        return next((size for size in sizes if size.whole % (size.processes * FP8_MULTIPLE)), None)

    def changed(self, settings: Mapping[str, Any]) -> "Setup":
        """The setup with other settings, by their names in the config: `parallel.X`, or a field of the stage."""
        own = {key: value for key, value in settings.items() if not key.startswith("parallel.")}
        layout = {key.removeprefix("parallel."): value for key, value in settings.items() if key not in own}
        return replace(self, parallel=self.parallel.model_copy(update=layout), **own)

    def value(self, field: str) -> Any:
        """The value of such a setting."""
        place, _, name = field.rpartition(".")
        return getattr(getattr(self, place) if place else self, name)
