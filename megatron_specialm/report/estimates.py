"""What a config would train, as typed rows: by the arithmetic of `estimate/`, and by the tokenized text in the run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.artifacts import artifact_folder, read_marker
from megatron_specialm.base.gpus import dense_peak
from megatron_specialm.config.finetuning import finetuning_recipe
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.estimate.flops import Passes, device_hours
from megatron_specialm.estimate.memory import Memory, memory_of
from megatron_specialm.estimate.parameters import count_parameters, count_trained_parameters
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.graph.lineage import (
    distinct_setups,
    model_keys,
    setup_of,
    text_set,
    tokenize_stage,
    train_stage,
)
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.rates import steps_to_compare
from megatron_specialm.graph.tasks import TaskId, text_read, text_validated

Plan = Mapping[TaskId, PlannedTask]
NO_PLAN: Plan = MappingProxyType({})
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class TrainingEstimate:
    """A train stage. Steps and slots are of the longest run, and at most these: early stopping makes runs shorter.

    Attributes:
        runs: of the stage; each learning rate that is tried is one.
        parameters: of the model as exported, for the vocabulary asked for, which an existing tokenizer decides itself.
        slots: token positions of a run, which FLOPs are of.
        fill: the share of real tokens in them; None where the run folder does not have the set that is read most.
        flops: of all runs; with those of validations where the run folder has the set that is held out.
        gpu_hours: of all runs; None where the machine's peak is not known.
    """

    stage: str
    runs: int
    parameters: int
    trained_parameters: int
    steps: int
    slots: int
    fill: float | None
    step_flops: int
    flops: int
    gpu_hours: float | None


@dataclass(frozen=True)
class MemoryEstimate:
    """A setup of a config: its layout, and what the process that needs most needs, as set and by each recomputation policy."""

    stage: str
    layout: str
    memory: Memory
    by_recompute: Mapping[str, Memory]


def training_estimates(pipeline: Pipeline, machine: Accelerator, plan: Plan = NO_PLAN) -> list[TrainingEstimate]:
    """One per train stage."""
    estimates = []
    peak = dense_peak(machine.name)
    for name, stage in pipeline.stages.items():
        if not isinstance(stage, TrainStage):
            continue
        setup, keys = setup_of(pipeline, name), model_keys(pipeline, name)
        steps = max(_steps(pipeline, stage, key) for key in keys)
        flops = stage_flops(pipeline, name, plan)
        estimates.append(
            TrainingEstimate(
                stage=name,
                runs=len(keys) * len(stage.optimizer.rates),
                parameters=count_parameters(setup.model.plain, setup.vocabulary_size),
                trained_parameters=count_trained_parameters(setup.model, setup.vocabulary_size),
                steps=steps,
                slots=steps * setup.global_batch_size * setup.context_length,
                fill=_fill(pipeline, stage, keys, plan),
                step_flops=setup.step_flops,
                flops=flops,
                gpu_hours=device_hours(flops, peak) if peak else None,
            )
        )
    return estimates


def memory_estimates(pipeline: Pipeline, machine: Accelerator) -> list[MemoryEstimate]:
    """One per distinct setup of the config."""
    fused = machine.has_fused_layers
    return [
        MemoryEstimate(
            stage=name,
            layout=setup.parallel.describe(),
            memory=memory_of(setup, fused=fused),
            by_recompute={
                policy: memory_of(setup.changed({"parallel.recompute": policy}), fused=fused) for policy in RECOMPUTE
            },
        )
        for name, setup in distinct_setups(pipeline, None).items()
    ]


def stage_flops(pipeline: Pipeline, name: str, plan: Plan = NO_PLAN) -> int:
    """FLOPs of all runs of a train stage, at most; those of its validations are left out where the held-out text has not
    been tokenized yet."""
    stage, setup = train_stage(pipeline, name), setup_of(pipeline, name)
    total = 0
    for key in model_keys(pipeline, name):
        steps = _steps(pipeline, stage, key)
        # The training at the best rate goes on from its trial; at the others it ends there.
        others = [min(steps, steps_to_compare(stage) or steps)] * (len(stage.optimizer.rates) - 1)
        held_out = _tokenized(pipeline, plan, TaskId(stage.tokens, text_validated(stage, key)))
        for run in (steps, *others):
            total += run * setup.step_flops + setup.flops(_validations(stage, setup, held_out, steps=run))
    return total


def _validations(stage: TrainStage, setup: Setup, counts: Mapping[str, Any] | None, *, steps: int) -> Passes:
    """Passes of a run's validations, at most: before the first step, every so many steps, and at the last.

    Args:
        counts: those of the set that is held out.
    """
    if stage.early_stopping is None or counts is None:
        return Passes()
    batches = -(-counts["windows"]["validation"] // stage.micro_batch_size)
    if stage.projection is not None:
        batches += stage.projection.experts  # a batch is of one expert: each may end with one that is not full
    times = 1 + -(-steps // stage.early_stopping.evaluate_every)
    # All copies make equally many passes, as many as keep all pipeline stages busy: empty batches fill them up.
    together = stage.parallel.data_parallel * stage.parallel.pipeline_parallel
    made = times * together * -(-batches // together)
    slots = made * stage.micro_batch_size * setup.context_length
    return Passes(evaluated=slots, evaluated_variants=made)


def _tokenized(pipeline: Pipeline, plan: Plan, name: TaskId) -> Mapping[str, Any] | None:
    """Counts by split of a set as the plan wants it; None where it is not tokenized so, or the plan does not have it."""
    if (planned := plan.get(name)) is None:
        return None
    marker = read_marker(artifact_folder(planned.there or Path(pipeline.root), *name, planned.digest))
    return marker.values if marker is not None and "windows" in marker.values else None


def _fill(pipeline: Pipeline, stage: TrainStage, keys: Sequence[str], plan: Plan) -> float | None:
    """The share of real tokens in the windows of the sets that runs read most of; None where one is not tokenized."""
    fills = []
    context = tokenize_stage(pipeline, stage.tokens).context_length
    for source in dict.fromkeys(text_read(stage, key)[0] for key in keys):
        if (counts := _tokenized(pipeline, plan, TaskId(stage.tokens, source))) is None:
            return None
        fills.append(counts["tokens"]["train"] / (counts["windows"]["train"] * context))
    return sum(fills) / len(fills)


def _steps(pipeline: Pipeline, stage: TrainStage, key: str) -> int:
    """Steps of one run, at most: a recipe goes by the size of the domain's set, where the config says it."""
    size = text_set(pipeline, key).train_tokens if stage.recipe else None
    return stage.steps if size is None else finetuning_recipe(stage, set_tokens=size).steps
