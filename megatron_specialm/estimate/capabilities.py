"""What can be trained how: the one table of engine x model x layout x precision.

A capability is a feature of a setup: when a setup has it, and on which conditions. A condition that does not hold is refused
with all its numbers and the nearest value that does. Nothing else in the project decides what is allowed.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.packages import DEEPSPEED
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.estimate.capability import BOTH, Capability, Condition, Machine, Refusal
from megatron_specialm.estimate.expert_capabilities import EXPERTS
from megatron_specialm.estimate.machine_needs import (
    USE_BF16,
    fp8_of,
    lacks_context_parallel,
    lacks_deepspeed,
    lacks_fp8,
)
from megatron_specialm.estimate.packing_capabilities import PACKING
from megatron_specialm.estimate.setup import FP8_MULTIPLE, Setup

REACH = 10_000  # values that are tried for a condition to hold, the nearest first


def _zero_stage(setup: Setup) -> int:
    return setup.parallel.zero_stage


def _size(name: str) -> Callable[[Setup], bool]:
    return lambda setup: getattr(setup.parallel, name) > 1


def _fits_tensor_parallel(model: ModelConfig | None, size: int) -> bool:
    return model is None or not (model.attention_heads % size or model.kv_heads % size or model.ffn_hidden_size % size)


def _has_derived_weights(setup: Setup) -> bool:
    return setup.model.projection is not None or setup.model.lora is not None


TABLE = (
    Capability(
        "data parallel", lambda _: True, "global_batch_size is a multiple of micro_batch_size x data_parallel",
        engines=BOTH,
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
        engines=BOTH,
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
        without="parallel.sequence_parallel: false",
        why_not="ZeRO does not sum the norms' gradients over the tensor-parallel ranks",
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
        without="parallel.pipeline_parallel: 1",
        why_not="its pipeline takes another kind of model, a list of layers, and goes with ZeRO-1 at most",
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
        without="parallel.virtual_pipeline: 1", why_not="it has no pipeline",
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
        without="parallel.context_parallel: 1", why_not="its data-parallel ranks hold whole windows",
        machine=Machine("GPU with Transformer Engine", lacks_context_parallel),
        conditions=(
            Condition(
                lambda s: s.context_length % (2 * s.parallel.context_parallel) == 0,
                "context_parallel {p.context_parallel}: context_length {s.context_length} must be a multiple of twice "
                "that",
                "parallel.context_parallel",
            ),
        ),
    ),
    *EXPERTS,
    *PACKING,
    Capability("distributed optimizer", lambda s: s.parallel.engine == "megatron" and _zero_stage(s) > 0, "none"),
    Capability("overlapped communication", lambda s: getattr(s.parallel, "overlap_communication", False), "none"),
    Capability(
        "ZeRO", lambda s: s.parallel.engine == "deepspeed", "stages 0 to 3 in fp32, 1 to 3 in bf16",
        engines=("deepspeed",),
        machine=Machine(f"deepspeed {DEEPSPEED}", lacks_deepspeed),
        conditions=(
            Condition(
                lambda s: s.precision != "bf16" or _zero_stage(s) > 0,
                "bf16 with zero_stage {p.zero_stage}: DeepSpeed then has no fp32 main weights, and small updates are lost",
                "parallel.zero_stage",
            ),
        ),
    ),
    Capability(
        "optimizer on the host", lambda s: s.parallel.offload_optimizer, "zero_stage 1 to 3",
        engines=("deepspeed",),
        conditions=(
            Condition(
                lambda s: _zero_stage(s) > 0,
                "offload_optimizer with zero_stage {p.zero_stage}: it is the state that ZeRO splits that goes to the host",
                "parallel.zero_stage",
            ),
        ),
    ),
    Capability("recomputation", lambda s: s.parallel.recompute != "none", "none", engines=BOTH),
    Capability(
        "projected network", lambda s: s.model.projection is not None,
        "global_batch_size is a multiple of windows_per_expert, and unless packed windows_per_expert of micro_batch_size",
        engines=BOTH,
        conditions=(
            Condition(
                lambda s: s.packing == "packed" or s.windows_per_expert % s.micro_batch_size == 0,
                "with packing {s.packing} windows_per_expert {s.windows_per_expert} must be a multiple of micro_batch_size "
                "{s.micro_batch_size}: a forward pass is of one expert",
                "micro_batch_size",
            ),
            Condition(
                lambda s: s.global_batch_size % s.windows_per_expert == 0,
                "global_batch_size {s.global_batch_size} must be a multiple of windows_per_expert {s.windows_per_expert}",
                "global_batch_size",
            ),
        ),
    ),
    Capability("LoRA", lambda s: s.model.lora is not None, "none", engines=BOTH),
    Capability(
        "projected network or LoRA with ZeRO", lambda s: s.parallel.engine == "deepspeed" and _has_derived_weights(s),
        "fp32; LoRA: zero_stage 0 or 1; projected network: 0 to 2",
        engines=("deepspeed",),
        conditions=(
            Condition(
                lambda s: s.precision == "fp32",
                "{s.precision} under engine deepspeed rounds the weights from which a projected network's or LoRA's are "
                "computed, which stay in fp32 otherwise",
                remedy="set precision: fp32, or parallel.engine: megatron",
            ),
            Condition(
                lambda s: s.model.lora is None or _zero_stage(s) <= 1,
                "LoRA with zero_stage {p.zero_stage}: ZeRO-2 and 3 reduce gradients after each micro-batch, whose backward "
                "pass reaches no trained weight",
                "parallel.zero_stage",
            ),
            Condition(
                lambda s: _zero_stage(s) <= 2,
                "projected network with zero_stage {p.zero_stage}: weights are computed before the forward pass, when ZeRO-3 "
                "has gathered no parameter",
                "parallel.zero_stage",
            ),
        ),
    ),
    Capability(
        "teacher beside the student", lambda s: s.teacher is not None,
        "pipeline_parallel 1; tensor_parallel fits the teacher too",
        engines=BOTH,
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
    Capability("fp32", lambda s: s.precision == "fp32", "none", engines=BOTH),
    Capability("bf16", lambda s: s.precision == "bf16", "none", engines=BOTH),
    Capability(
        "fp8", lambda s: s.precision == "fp8",
        f"every process's matrix sizes are multiples of {FP8_MULTIPLE}; recipe blockwise: Hopper or later",
        without="precision: bf16", why_not="it has not been tested with it",
        machine=Machine("GPU from Ada on, with Transformer Engine", lacks_fp8),
        conditions=(
            Condition(
                lambda s: s.misaligned_for_fp8 is None,
                f"fp8 takes sizes that are multiples of {FP8_MULTIPLE} on each process, and {{s.misaligned_for_fp8.name}} "
                "{s.misaligned_for_fp8.whole} / {s.misaligned_for_fp8.processes} processes is not",
                remedy=USE_BF16,
            ),
            Condition(
                lambda s: not _has_derived_weights(s),
                "fp8 keeps a linear's rounded weight from micro-batch to micro-batch, and a projected network's or LoRA's "
                "change",
                remedy=USE_BF16,
            ),
            Condition(
                lambda s: (
                    max(fp8_of(s).bf16_first_layers, fp8_of(s).bf16_last_layers)
                    <= s.model.layers // s.parallel.pipeline_parallel
                ),
                "fp8.bf16_first_layers {fp8.bf16_first_layers} and fp8.bf16_last_layers {fp8.bf16_last_layers} must each be at "
                "most the layers of a pipeline stage, {s.model.layers} / {p.pipeline_parallel}",
                remedy="lower them",
            ),
            Condition(
                lambda s: fp8_of(s).bf16_layers < s.model.layers,
                "fp8.bf16_first_layers {fp8.bf16_first_layers} and fp8.bf16_last_layers {fp8.bf16_last_layers} leave none of "
                "the {s.model.layers} layers in fp8",
                remedy=USE_BF16,
            ),
        ),
    ),
)  # fmt: skip


def violation(setup: Setup) -> Refusal | None:
    """The first of a setup's features that its engine does not offer, or else the first condition that does not hold, with the
    nearest value that does; None if all hold."""
    asked = [capability for capability in TABLE if capability.asked(setup)]
    for capability in asked:
        if setup.parallel.engine not in capability.engines:
            return _not_offered(capability, setup)
    for capability in asked:
        for condition in capability.conditions:
            if not condition.holds(setup):
                reason = condition.reason.format(s=setup, p=setup.parallel, fp8=setup.fp8)
                return Refusal(reason, condition.remedy or _nearest_value(condition, setup))
    return None


def is_allowed(setup: Setup) -> bool:
    """Whether there is no `violation`. It does not look for a value that would do."""
    asked = (capability for capability in TABLE if capability.asked(setup))
    return all(
        setup.parallel.engine in capability.engines
        and all(condition.holds(setup) for condition in capability.conditions)
        for capability in asked
    )


def _not_offered(capability: Capability, setup: Setup) -> Refusal:
    why = f": {capability.why_not}" if capability.why_not else ""
    without = f"set {capability.without}, or " if capability.without else "set "
    return Refusal(
        f"engine {setup.parallel.engine} does not offer {capability.feature}{why}",
        f"{without}parallel.engine: {capability.engines[0]}",
    )


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
    """The value of the condition's field with which the condition holds, if there is any: of those with which the fewest other
    conditions do not, the nearest to the present one."""
    present = setup.value(condition.field)
    values = islice(_nearest(present, below=2 * present + setup.shard), REACH)
    changed = ((value, setup.changed({condition.field: value})) for value in values)
    broken = {value: _count_broken(other) for value, other in changed if _holds(condition, other)}
    if not broken:
        return "no other value of it would do: change the layout"
    return f"the nearest {condition.field} that does is {min(broken, key=broken.__getitem__)}"


def _nearest(present: int, *, below: int) -> Iterator[int]:
    """The numbers from 1, the nearest to the present one first."""
    for distance in range(below):
        yield from (value for value in dict.fromkeys((present - distance, present + distance)) if 0 < value < below)


def _holds(condition: Condition, setup: Setup) -> bool:
    batch = TABLE[0].conditions[0]  # a proposal must not break the batch
    return condition.holds(setup) and (batch.holds(setup) or condition is batch)


def _count_broken(setup: Setup) -> int:
    asked = (capability for capability in TABLE if capability.applies(setup))
    return sum(not condition.holds(setup) for capability in asked for condition in capability.conditions)
