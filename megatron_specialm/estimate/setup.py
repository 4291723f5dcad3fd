"""What one training asks of its engine and of the machine: model, layout, precision, batch. All arithmetic, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Fp8Config, Precision
from megatron_specialm.estimate.flops import Passes, forward_flops, projection_flops, training_flops

FP8_MULTIPLE = 16  # bytes, to which cuBLAS wants every row of an FP8 matrix aligned


@dataclass(frozen=True)
class MatrixSize:
    """A size of the matrices that a process multiplies: `whole`, over so many processes."""

    name: str
    whole: int
    processes: int


@dataclass(frozen=True)
class Setup:
    """What one train stage asks for."""

    model: ModelConfig
    parallel: ParallelConfig
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
        flops = passes.trained * training_flops(self.model, *sizes)
        flops += passes.evaluated * forward_flops(self.model, *sizes)
        if self.teacher is not None:
            flops += passes.trained * forward_flops(self.teacher, *sizes)
        if self.model.projection is not None:
            flops += projection_flops(self.model, passes.trained_variants)
            flops += projection_flops(self.model, passes.evaluated_variants, forward_only=True)
        return flops

    @property
    def misaligned_for_fp8(self) -> MatrixSize | None:
        """The first size of a process's matrices that is no multiple of `FP8_MULTIPLE`."""
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
        """The setup with other values of settings, named as in the config: `parallel.X`, or a field of the stage."""
        own = {key: value for key, value in settings.items() if not key.startswith("parallel.")}
        layout = {key.removeprefix("parallel."): value for key, value in settings.items() if key not in own}
        return replace(self, parallel=self.parallel.model_copy(update=layout), **own)

    def value(self, field: str) -> int:
        """The value of such a setting."""
        place, _, name = field.rpartition(".")
        return getattr(getattr(self, place) if place else self, name)
