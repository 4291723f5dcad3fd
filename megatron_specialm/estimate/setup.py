"""What one training asks of its engine and of the machine: model, layout, precision, batch. All arithmetic, no torch."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_specialm.base.shapes import Count
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import Layout
from megatron_specialm.config.precision import Fp8Config, Precision

FP8_MULTIPLE = 16  # bytes, to which cuBLAS wants every row of an FP8 matrix aligned


class Passes(NamedTuple):
    """Passes through a model: slots (token positions, padding included) that went forward and backward, and those that
    went forward only, as in validations; and how often weights were derived for them, for a mixture of experts or of
    adapters and their base."""

    trained: Count = 0
    evaluated: Count = 0
    trained_variants: Count = 0
    evaluated_variants: Count = 0

    def after(self, slots: int, variants: int, *, forward_only: bool) -> "Passes":
        """These, and one over so many slots, computed with so many mixtures."""
        return self.plus(Passes(0, slots, 0, variants) if forward_only else Passes(slots, 0, variants, 0))

    def plus(self, other: "Passes", *, times: int = 1) -> "Passes":
        """These, and `times` the others."""
        return Passes(*(own + times * more for own, more in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Setup:
    """What one train stage asks for."""

    model: ModelConfig
    parallel: Layout
    precision: Precision
    vocabulary_size: int  # asked for: a tokenizer that is there already decides itself
    context_length: int
    global_batch_size: int
    micro_batch_size: int
    fp8: Fp8Config | None = None
    windows_per_expert: int = 1  # in a row, computed by the same weights; more in a projected network
    variants: int = 0  # mixtures of experts that a step projects
    teacher: ModelConfig | None = None  # that computes beside the student

    @property
    def shard(self) -> int:
        """Windows per step of one micro-batch on every copy."""
        return self.micro_batch_size * self.parallel.data_parallel

    @property
    def micro_batches(self) -> int:
        """Forward passes per step and copy."""
        return self.global_batch_size // self.shard

    @property
    def step_flops(self) -> int:
        """FLOPs of an optimizer step, at most: where it computes with fewer experts than it has groups, fewer are
        projected."""
        return self.flops(Passes(trained=self.global_batch_size * self.context_length, trained_variants=self.variants))

    def flops(self, passes: Passes) -> int:
        """FLOPs of passes: the model's own, those of a teacher that computes beside it in training, and of projections,
        whose backward pass costs twice their forward pass too."""
        sizes = self.vocabulary_size, self.context_length
        per_trained = self.model.training_flops(*sizes) + (self.teacher.forward_flops(*sizes) if self.teacher else 0)
        linears = passes.trained * per_trained + passes.evaluated * self.model.forward_flops(*sizes)
        if self.model.projection is None:
            return linears
        projected = 3 * passes.trained_variants + passes.evaluated_variants
        return linears + projected * self.model.projection_flops(1) // 3

    def recomputing(self, policy: str) -> "Setup":
        """The setup with another recomputation policy."""
        return replace(self, parallel=self.parallel.model_copy(update={"recompute": policy}))

    @property
    def not_for_fp8(self) -> str | None:
        """The first size of a process's matrices that is no multiple of what FP8 takes."""
        parallel, model = self.parallel, self.model
        tensor = parallel.tensor_parallel
        positions = parallel.context_parallel * (tensor if parallel.sequence_parallel else 1)
        sizes = {
            "hidden_size": (model.hidden_size, tensor),
            "ffn_hidden_size": (model.ffn_hidden_size, tensor),
            "query, key and value size": (model.qkv_size, tensor),
            "micro_batch_size x context_length": (self.micro_batch_size * self.context_length, positions),
        }
        for name, (whole, processes) in sizes.items():
            if whole % (processes * FP8_MULTIPLE):
                return f"{name} {whole} / {processes} processes"
        return None

    @property
    def bf16_layers(self) -> tuple[int, int]:
        """First and last layers that stay bf16 under FP8."""
        return (self.fp8.bf16_first_layers, self.fp8.bf16_last_layers) if self.fp8 else (0, 0)

    def changed(self, field: str, value: int) -> "Setup":
        """The setup with another value of a field, named as in the config: `parallel.X` or a field of the stage."""
        place, _, name = field.rpartition(".")
        if place == "parallel":
            return replace(self, parallel=self.parallel.model_copy(update={name: value}))
        changes: dict[str, Any] = {name: value}
        return replace(self, **changes)

    def value(self, field: str) -> int:
        """The value of such a field."""
        place, _, name = field.rpartition(".")
        return getattr(getattr(self, place) if place else self, name)
