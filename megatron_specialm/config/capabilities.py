"""What can be trained how: the one table of engine x model x layout x precision.

Each capability says when a training asks for it and which conditions it then puts. A condition that does not hold is
refused with all numbers and the nearest value that would do. Nothing else in the project says what is allowed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Setup:
    """What one train stage asks for."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: str
    context_length: int
    global_batch_size: int
    micro_batch_size: int

    @property
    def shard(self) -> int:
        """Windows per step of one micro-batch on every copy."""
        return self.micro_batch_size * self.parallel.data_parallel

    @property
    def micro_batches(self) -> int:
        """Forward passes per step and copy."""
        return self.global_batch_size // self.shard

    def changed(self, field: str, value: int) -> "Setup":
        """The setup with another value of a field, named as in the page: `parallel.X` or a field of the stage."""
        place, _, name = field.rpartition(".")
        if place == "parallel":
            return replace(self, parallel=self.parallel.model_copy(update={name: value}))
        changes: dict[str, Any] = {name: value}
        return replace(self, **changes)

    def value(self, field: str) -> int:
        """The value of such a field."""
        place, _, name = field.rpartition(".")
        return getattr(getattr(self, place) if place else self, name)


@dataclass(frozen=True)
class Condition:
    """`holds`, or `reason` (a template over the setup `s` and the parallel settings `p`) says why not; the way out is
    another value of `field`."""

    field: str
    holds: Callable[[Setup], bool]
    reason: str


@dataclass(frozen=True)
class Capability:
    """A feature, what it is good for, and its conditions in one line."""

    feature: str
    asked: Callable[[Setup], bool]
    terms: str
    machine: str = "any"
    conditions: tuple[Condition, ...] = ()


def _size(name: str) -> Callable[[Setup], bool]:
    return lambda setup: getattr(setup.parallel, name) > 1


TABLE = (
    Capability(
        "data parallel", lambda _: True, "global_batch_size is a multiple of micro_batch_size x data_parallel",
        conditions=(
            Condition(
                "global_batch_size", lambda s: s.global_batch_size % s.shard == 0,
                "global_batch_size {s.global_batch_size} must be a multiple of micro_batch_size {s.micro_batch_size} "
                "x data_parallel {p.data_parallel} = {s.shard}",
            ),
        ),
    ),
    Capability(
        "tensor parallel", _size("tensor_parallel"),
        "divides attention heads, query groups and ffn_hidden_size; any vocabulary",
        conditions=(
            Condition(
                "parallel.tensor_parallel", lambda s: s.model.attention_heads % s.parallel.tensor_parallel == 0,
                "tensor_parallel {p.tensor_parallel} must divide the model's attention_heads {s.model.attention_heads}",
            ),
            Condition(
                "parallel.tensor_parallel", lambda s: s.model.kv_heads % s.parallel.tensor_parallel == 0,
                "tensor_parallel {p.tensor_parallel} must divide the model's query_groups {s.model.kv_heads}",
            ),
            Condition(
                "parallel.tensor_parallel", lambda s: s.model.ffn_hidden_size % s.parallel.tensor_parallel == 0,
                "tensor_parallel {p.tensor_parallel} must divide the model's ffn_hidden_size {s.model.ffn_hidden_size}",
            ),
        ),
    ),
    Capability(
        "sequence parallel", lambda s: s.parallel.sequence_parallel, "tensor_parallel divides context_length",
        conditions=(
            Condition(
                "parallel.tensor_parallel", lambda s: s.context_length % s.parallel.tensor_parallel == 0,
                "sequence_parallel: tensor_parallel {p.tensor_parallel} must divide context_length {s.context_length}",
            ),
        ),
    ),
    Capability(
        "pipeline parallel", _size("pipeline_parallel"),
        "a layer or more per stage (any number in all); as many micro-batches as stages or more",
        conditions=(
            Condition(
                "parallel.pipeline_parallel", lambda s: s.model.layers >= s.parallel.chunks,
                "pipeline_parallel {p.pipeline_parallel} x virtual_pipeline {p.virtual_pipeline} = {p.chunks} is more "
                "than the model's {s.model.layers} layers",
            ),
            Condition(
                "micro_batch_size", lambda s: s.micro_batches >= s.parallel.pipeline_parallel,
                "global_batch_size {s.global_batch_size} / (micro_batch_size {s.micro_batch_size} x data_parallel "
                "{p.data_parallel}) = {s.micro_batches} micro-batches are fewer than pipeline_parallel "
                "{p.pipeline_parallel}: stages would always idle",
            ),
        ),
    ),
    Capability(
        "interleaved pipeline", _size("virtual_pipeline"), "the number of micro-batches is a multiple of the stages",
        conditions=(
            Condition(
                "global_batch_size", lambda s: s.micro_batches % s.parallel.pipeline_parallel == 0,
                "virtual_pipeline {p.virtual_pipeline}: {s.micro_batches} micro-batches must be a multiple of "
                "pipeline_parallel {p.pipeline_parallel}",
            ),
        ),
    ),
    Capability(
        "context parallel", _size("context_parallel"), "context_length is a multiple of 2 x context_parallel",
        machine="GPU with Transformer Engine",
        conditions=(
            Condition(
                "parallel.context_parallel", lambda s: s.context_length % (2 * s.parallel.context_parallel) == 0,
                "context_parallel {p.context_parallel}: context_length {s.context_length} must be a multiple of twice "
                "that",
            ),
        ),
    ),
    Capability("distributed optimizer", lambda s: s.parallel.distributed_optimizer, "none"),
    Capability("overlapped communication", lambda s: s.parallel.overlap_communication, "none"),
    Capability("recomputation", lambda s: s.parallel.recompute != "none", "none"),
    Capability("fp32", lambda s: s.precision == "fp32", "none"),
    Capability("bf16", lambda s: s.precision == "bf16", "none"),
)  # fmt: skip


def refuse(name: str, setup: Setup) -> None:
    """Check a train stage's setup.

    Raises:
        ConfigError: naming the stage, all numbers of the condition that does not hold, and the nearest value that does.
    """
    for capability in TABLE:
        if capability.asked(setup):
            for condition in capability.conditions:
                if not condition.holds(setup):
                    reason = condition.reason.format(s=setup, p=setup.parallel)
                    raise ConfigError(f"stages.{name}: {reason}; {_way_out(condition, setup)}")


def _way_out(condition: Condition, setup: Setup) -> str:
    """The value of the condition's field that is nearest to the present one and lets everything hold, if any does."""
    present = setup.value(condition.field)
    for value in sorted(range(1, 2 * present + setup.shard), key=lambda value: abs(value - present)):
        candidate = setup.changed(condition.field, value)
        if _holds(condition, candidate):
            return f"the nearest {condition.field} that does is {value}"
    return "no other value of it would do: change the layout"


def _holds(condition: Condition, setup: Setup) -> bool:
    own = TABLE[0].conditions[0]  # a way out must not break the batch
    return condition.holds(setup) and (own.holds(setup) or condition is own)


def rows() -> list[dict[str, str]]:
    """The table for a reader."""
    fixed = {"engine": "megatron", "models": "neox, llama"}
    return [{**fixed, "feature": row.feature, "machine": row.machine, "terms": row.terms} for row in TABLE]
