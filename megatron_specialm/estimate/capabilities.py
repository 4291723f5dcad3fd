"""What can be trained how: the one table of engine x model x layout x precision.

A capability is a feature of a setup: when a setup has it, and on which conditions. A condition that does not hold is refused
with all its numbers and the nearest value that does. Nothing else in the project decides what is allowed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.packages import INSTALL_TRANSFORMER_ENGINE, TRANSFORMER_ENGINE, satisfies
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.precision import Fp8Config
from megatron_specialm.estimate.setup import FP8_MULTIPLE, Setup

# The least compute capability per recipe: 8.9 is Ada, 9.0 is Hopper.
FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
REACH = 10_000  # values that are tried for a condition to hold, the nearest first
USE_BF16 = "use `precision: bf16`"


@dataclass(frozen=True)
class Refusal:
    """Why a setup cannot be trained, and a change with which it can."""

    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.remedy}"


@dataclass(frozen=True)
class Condition:
    """What must hold of a setup.

    Attributes:
        reason: why it is refused otherwise: a template over the setup `s`, its parallel settings `p` and its `fp8`.
        field: a setting with which it holds at another value; the nearest is proposed.
        remedy: a proposal, if another value of a single setting does not help.
    """

    holds: Callable[[Setup], bool]
    reason: str
    field: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Machine:
    """What a feature needs of the machine, in words, and why a given machine does not have it."""

    needs: str
    lacks: Callable[[Setup, Accelerator], Refusal | None]


ANY = Machine("any", lambda _, __: None)


@dataclass(frozen=True)
class Capability:
    """A feature of the engines named: when a setup asks for it, and its conditions, also in words (`terms`)."""

    feature: str
    asked: Callable[[Setup], bool]
    terms: str
    machine: Machine = ANY
    conditions: tuple[Condition, ...] = ()
    engines: tuple[str, ...] = ("megatron",)
    models: str = "neox, llama"

    def applies(self, setup: Setup) -> bool:
        """Whether a setup asks its engine for this."""
        return setup.parallel.engine in self.engines and self.asked(setup)


def _fp8(setup: Setup) -> Fp8Config:
    assert setup.fp8 is not None
    return setup.fp8


def _lacks_fp8(setup: Setup, machine: Accelerator) -> Refusal | None:
    recipe = _fp8(setup).recipe
    needed, asked = FP8_CAPABILITY[recipe], f"fp8 with recipe {recipe}"
    if machine.capability is not None and machine.capability >= needed:
        return _lacks_transformer_engine(asked, machine, USE_BF16)
    other = "recipe: tensorwise, or " if (machine.capability or (0, 0)) >= FP8_CAPABILITY["tensorwise"] else ""
    return Refusal(
        f"{asked} needs a GPU of compute capability {needed[0]}.{needed[1]} or more, and this machine has "
        f"{machine.describe()}",
        f"{other}{USE_BF16}",
    )


def _lacks_context_parallel(setup: Setup, machine: Accelerator) -> Refusal | None:
    asked = f"context_parallel {setup.parallel.context_parallel}"
    otherwise = "set it to 1 and share the sequence with sequence_parallel"
    if machine.capability is None:
        return Refusal(f"{asked} needs GPUs with Transformer Engine, and this machine has no GPU", otherwise)
    if setup.precision == "fp32":
        reason = f"{asked} needs Transformer Engine's attention, which takes no fp32"
        return Refusal(reason, f"set precision: bf16, or {otherwise}")
    return _lacks_transformer_engine(asked, machine, otherwise)


def _lacks_transformer_engine(asked: str, machine: Accelerator, otherwise: str) -> Refusal | None:
    version = machine.transformer_engine
    if version is not None and satisfies(version, TRANSFORMER_ENGINE):
        return None
    found = f"version {version} is installed" if version else "it is not installed"
    reason = f"{asked} needs Transformer Engine {TRANSFORMER_ENGINE}, and {found}"
    return Refusal(reason, f"{INSTALL_TRANSFORMER_ENGINE}, or {otherwise}")


def _size(name: str) -> Callable[[Setup], bool]:
    return lambda setup: getattr(setup.parallel, name) > 1


def _fits_tensor_parallel(model: ModelConfig | None, size: int) -> bool:
    return model is None or not (model.attention_heads % size or model.kv_heads % size or model.ffn_hidden_size % size)


def _moe_sizes(setup: Setup) -> Iterator[int]:
    """The feed-forward sizes of MoE layers, of the model and its teacher."""
    layers = ((model, layer) for model in setup.moe_models for layer in range(model.layers) if model.experts_of(layer))
    return (part.ffn_hidden_size for model, layer in layers for part in model.feed_forward_parts(layer))


TABLE = (
    Capability(
        "data parallel", lambda _: True, "global_batch_size is a multiple of micro_batch_size x data_parallel",
        conditions=(
            Condition(
                lambda s: s.global_batch_size % s.shard == 0,
                "global_batch_size {s.global_batch_size} must be a multiple of micro_batch_size {s.micro_batch_size} "
                "x data_parallel {p.data_parallel} = {s.shard}",
                "global_batch_size",
            ),
        ),
    ),
    Capability(
        "tensor parallel", _size("tensor_parallel"),
        "divides attention heads, query groups and ffn_hidden_size; any vocabulary",
        conditions=(
            Condition(
                lambda s: s.model.attention_heads % s.parallel.tensor_parallel == 0,
                "tensor_parallel {p.tensor_parallel} must divide the model's attention_heads {s.model.attention_heads}",
                "parallel.tensor_parallel",
            ),
            Condition(
                lambda s: s.model.kv_heads % s.parallel.tensor_parallel == 0,
                "tensor_parallel {p.tensor_parallel} must divide the model's query_groups {s.model.kv_heads}",
                "parallel.tensor_parallel",
            ),
            Condition(
                lambda s: s.model.ffn_hidden_size % s.parallel.tensor_parallel == 0,
                "tensor_parallel {p.tensor_parallel} must divide the model's ffn_hidden_size {s.model.ffn_hidden_size}",
                "parallel.tensor_parallel",
            ),
        ),
    ),
    Capability(
        "sequence parallel", lambda s: s.parallel.sequence_parallel, "tensor_parallel divides context_length",
        conditions=(
            Condition(
                lambda s: s.context_length % s.parallel.tensor_parallel == 0,
                "sequence_parallel: tensor_parallel {p.tensor_parallel} must divide context_length {s.context_length}",
                "parallel.tensor_parallel",
            ),
        ),
    ),
    Capability(
        "pipeline parallel", _size("pipeline_parallel"),
        "a layer or more per stage (any number in all); as many micro-batches as stages or more",
        conditions=(
            Condition(
                lambda s: s.model.layers >= s.parallel.chunks,
                "pipeline_parallel {p.pipeline_parallel} x virtual_pipeline {p.virtual_pipeline} = {p.chunks} is more "
                "than the model's {s.model.layers} layers",
                "parallel.pipeline_parallel",
            ),
            Condition(
                lambda s: s.micro_batches >= s.parallel.pipeline_parallel,
                "global_batch_size {s.global_batch_size} / (micro_batch_size {s.micro_batch_size} x data_parallel "
                "{p.data_parallel}) = {s.micro_batches} micro-batches are fewer than pipeline_parallel "
                "{p.pipeline_parallel}: stages would always idle",
                "micro_batch_size",
            ),
        ),
    ),
    Capability(
        "interleaved pipeline", _size("virtual_pipeline"), "the number of micro-batches is a multiple of the stages",
        conditions=(
            Condition(
                lambda s: s.micro_batches % s.parallel.pipeline_parallel == 0,
                "virtual_pipeline {p.virtual_pipeline}: {s.micro_batches} micro-batches must be a multiple of "
                "pipeline_parallel {p.pipeline_parallel}",
                "global_batch_size",
            ),
        ),
    ),
    Capability(
        "context parallel", _size("context_parallel"), "not fp32; context_length is a multiple of 2 x context_parallel",
        machine=Machine("GPU with Transformer Engine", _lacks_context_parallel),
        conditions=(
            Condition(
                lambda s: s.context_length % (2 * s.parallel.context_parallel) == 0,
                "context_parallel {p.context_parallel}: context_length {s.context_length} must be a multiple of twice "
                "that",
                "parallel.context_parallel",
            ),
        ),
    ),
    Capability(
        "mixture of experts", lambda s: s.model.moe is not None,
        "not fp8; with tensor_parallel: sequence_parallel too; a capacity_factor: context_parallel 1",
        conditions=(
            Condition(
                lambda s: s.fp8 is None,
                "moe: precision fp8 has not been measured with experts, whose numbers of tokens FP8 kernels do not fit",
                remedy="set precision: bf16",
            ),
            Condition(
                lambda s: s.parallel.context_parallel == 1 or s.model.moe is None or s.model.moe.capacity_factor is None,
                "moe.capacity_factor drops a window's last tokens first, and context_parallel {p.context_parallel} takes "
                "positions out of order",
                remedy="leave out moe.capacity_factor, or set parallel.context_parallel: 1",
            ),
            Condition(
                lambda s: s.parallel.tensor_parallel == 1 or s.parallel.sequence_parallel,
                "moe: tensor_parallel {p.tensor_parallel} without sequence_parallel would send each token to its experts "
                "{p.tensor_parallel} times",
                remedy="set parallel.sequence_parallel: true",
            ),
            Condition(
                lambda s: all(size % s.expert_tensor_parallel == 0 for size in _moe_sizes(s)),
                "tensor_parallel {p.tensor_parallel} must divide the feed-forward sizes of the experts",
                "parallel.tensor_parallel",
            ),
        ),
    ),
    Capability(
        "expert parallel", _size("expert_parallel"),
        "an MoE model; divides the experts of each layer, and data_parallel x context_parallel",
        conditions=(
            Condition(
                lambda s: bool(s.moe_models),
                "expert_parallel {p.expert_parallel} splits experts, and the model has no `moe`",
                remedy="set parallel.expert_parallel: 1",
            ),
            Condition(
                lambda s: all(count % s.parallel.expert_parallel == 0 for count in s.expert_counts),
                "expert_parallel {p.expert_parallel} must divide moe.experts {s.expert_counts}",
                "parallel.expert_parallel",
            ),
            Condition(
                lambda s: s.expert_ranks % s.parallel.expert_parallel == 0,
                "expert_parallel {p.expert_parallel} must divide the {s.expert_ranks} processes that have the same experts "
                "otherwise (data_parallel {p.data_parallel} x context_parallel {p.context_parallel}; with biases, x "
                "tensor_parallel)",
                "parallel.expert_parallel",
            ),
        ),
    ),
    Capability("distributed optimizer", lambda s: s.parallel.distributed_optimizer, "none"),
    Capability("overlapped communication", lambda s: s.parallel.overlap_communication, "none"),
    Capability("recomputation", lambda s: s.parallel.recompute != "none", "none"),
    Capability(
        "projected network", lambda s: s.model.projection is not None,
        "windows_per_expert is a multiple of micro_batch_size, global_batch_size of windows_per_expert",
        conditions=(
            Condition(
                lambda s: s.windows_per_expert % s.micro_batch_size == 0,
                "windows_per_expert {s.windows_per_expert} must be a multiple of micro_batch_size {s.micro_batch_size}: a "
                "forward pass is of one expert",
                "micro_batch_size",
            ),
            Condition(
                lambda s: s.global_batch_size % s.windows_per_expert == 0,
                "global_batch_size {s.global_batch_size} must be a multiple of windows_per_expert {s.windows_per_expert}",
                "global_batch_size",
            ),
        ),
    ),
    Capability("LoRA", lambda s: s.model.lora is not None, "none"),
    Capability(
        "teacher beside the student", lambda s: s.teacher is not None,
        "pipeline_parallel 1; tensor_parallel fits the teacher too",
        conditions=(
            Condition(
                lambda s: s.parallel.pipeline_parallel == 1,
                "distill: a teacher beside the student cannot be cut into stages, and pipeline_parallel is "
                "{p.pipeline_parallel}",
                remedy="make a cache with a stage of kind `teach` and name it as distill.cache, or set "
                "parallel.pipeline_parallel: 1",
            ),
            Condition(
                lambda s: s.parallel.context_parallel == 1,
                "distill: a teacher beside the student reads whole windows, and context_parallel is {p.context_parallel}",
                remedy="make a cache with a stage of kind `teach` and name it as distill.cache",
            ),
            Condition(
                lambda s: _fits_tensor_parallel(s.teacher, s.parallel.tensor_parallel),
                "distill: tensor_parallel {p.tensor_parallel} must divide the teacher's attention_heads "
                "{s.teacher.attention_heads}, key/value heads {s.teacher.kv_heads} and ffn_hidden_size "
                "{s.teacher.ffn_hidden_size} too",
                "parallel.tensor_parallel",
            ),
        ),
    ),
    Capability("fp32", lambda s: s.precision == "fp32", "none"),
    Capability("bf16", lambda s: s.precision == "bf16", "none"),
    Capability(
        "fp8", lambda s: s.precision == "fp8",
        f"every process's matrix sizes are multiples of {FP8_MULTIPLE}; recipe blockwise: Hopper or later",
        machine=Machine("GPU from Ada on, with Transformer Engine", _lacks_fp8),
        conditions=(
            Condition(
                lambda s: s.misaligned_for_fp8 is None,
                f"fp8 takes sizes that are multiples of {FP8_MULTIPLE} on each process, and {{s.misaligned_for_fp8.name}} "
                "{s.misaligned_for_fp8.whole} / {s.misaligned_for_fp8.processes} processes is not",
                remedy=USE_BF16,
            ),
            Condition(
                lambda s: s.model == s.model.base_config,
                "fp8 keeps a linear's rounded weight from micro-batch to micro-batch, and a projected network's or LoRA's "
                "change",
                remedy=USE_BF16,
            ),
            Condition(
                lambda s: (
                    max(_fp8(s).bf16_first_layers, _fp8(s).bf16_last_layers)
                    <= s.model.layers // s.parallel.pipeline_parallel
                ),
                "fp8.bf16_first_layers {fp8.bf16_first_layers} and fp8.bf16_last_layers {fp8.bf16_last_layers} must each be at "
                "most the layers of a pipeline stage, {s.model.layers} / {p.pipeline_parallel}",
                remedy="lower them",
            ),
            Condition(
                lambda s: _fp8(s).bf16_layers < s.model.layers,
                "fp8.bf16_first_layers {fp8.bf16_first_layers} and fp8.bf16_last_layers {fp8.bf16_last_layers} leave none of "
                "the {s.model.layers} layers in fp8",
                remedy=USE_BF16,
            ),
        ),
    ),
)  # fmt: skip


def violation(setup: Setup) -> Refusal | None:
    """The first condition of a setup's features that does not hold, with the nearest value that does; None if all hold."""
    for capability in TABLE:
        for condition in capability.conditions if capability.asked(setup) else ():
            if not condition.holds(setup):
                reason = condition.reason.format(s=setup, p=setup.parallel, fp8=setup.fp8)
                return Refusal(reason, condition.remedy or _nearest_value(condition, setup))
    return None


def refuse(name: str, setup: Setup) -> None:
    """Check a train stage's setup.

    Raises:
        ConfigError: naming the stage, all numbers of the condition that does not hold, and the nearest value that does.
    """
    if refusal := violation(setup):
        raise ConfigError(f"stages.{name}: {refusal.reason}; {refusal.remedy}")


def lacking(setup: Setup, machine: Accelerator) -> Refusal | None:
    """Why a machine cannot run a setup, and a change with which it can; None if it can."""
    refusals = (capability.machine.lacks(setup, machine) for capability in TABLE if capability.applies(setup))
    return next((refusal for refusal in refusals if refusal), None)


def _nearest_value(condition: Condition, setup: Setup) -> str:
    """The value of the condition's field, nearest to the present one, with which the condition holds, if there is any."""
    present = setup.value(condition.field)
    for value in islice(_nearest(present, below=2 * present + setup.shard), REACH):
        if _holds(condition, setup.changed({condition.field: value})):
            return f"the nearest {condition.field} that does is {value}"
    return "no other value of it would do: change the layout"


def _nearest(present: int, *, below: int) -> Iterator[int]:
    """The numbers from 1, the nearest to the present one first."""
    for distance in range(below):
        yield from (value for value in {present - distance: 0, present + distance: 0} if 0 < value < below)


def _holds(condition: Condition, setup: Setup) -> bool:
    batch = TABLE[0].conditions[0]  # a proposal must not break the batch
    return condition.holds(setup) and (batch.holds(setup) or condition is batch)
