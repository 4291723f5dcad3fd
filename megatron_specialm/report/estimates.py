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
from megatron_specialm.estimate.flops import device_hours
from megatron_specialm.estimate.memory import Memory, memory_of
from megatron_specialm.estimate.parameters import count_parameters, count_trained_parameters
from megatron_specialm.estimate.setup import Passes, Setup
from megatron_specialm.graph.lineage import (
    distinct_setups,
    model_keys,
    setup_of,
    text_set,
    tokenize_stage,
    train_stage,
    train_stages,
)
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.rates import steps_to_compare
from megatron_specialm.graph.tasks import TaskId

Plan = Mapping[TaskId, PlannedTask]
NO_PLAN: Plan = MappingProxyType({})
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class TrainingEstimate:
    """A train stage. Steps and slots are upper bounds, of the longest run: early stopping makes runs shorter.

    Attributes:
        runs: trainings of the stage; each learning rate that is tried is one.
        parameters: of the exported model, for the vocabulary size in the config; an existing tokenizer has its own.
        active_parameters: those of them that compute a token: fewer for a mixture of experts.
        slots: token positions of a run, padding included.
        fill: the fraction of real tokens in the slots; None if the set that is read most has not been tokenized.
        flops: of all runs, over slots; with validations if the held-out set has been tokenized.
        gpu_hours: of all runs at `TYPICAL_UTILISATION`; None if the machine's peak is not known.
    """

    stage: str
    runs: int
    parameters: int
    active_parameters: int
    trained_parameters: int
    steps: int
    slots: int
    fill: float | None
    step_flops: int
    flops: int
    gpu_hours: float | None


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of the process that needs most, for a setup of a config: as set, and with each recomputation policy."""

    stage: str
    layout: str
    memory: Memory
    by_recompute: Mapping[str, Memory]


def training_estimates(pipeline: Pipeline, machine: Accelerator, plan: Plan = NO_PLAN) -> list[TrainingEstimate]:
    """One per train stage."""
    estimates = []
    peak = dense_peak(machine.name)
    for name, stage in train_stages(pipeline).items():
        setup, keys = setup_of(pipeline, name), model_keys(pipeline, name)
        steps = max(_steps(pipeline, stage, key) for key in keys)
        flops = stage_flops(pipeline, name, plan)
        estimates.append(
            TrainingEstimate(
                stage=name,
                runs=len(keys) * len(stage.optimizer.rates),
                parameters=count_parameters(setup.model.base_config, setup.vocabulary_size),
                active_parameters=count_parameters(setup.model.base_config, setup.vocabulary_size, active=True),
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
    """An upper bound of the FLOPs of all runs of a train stage. Validations are left out if the held-out text has not been
    tokenized yet."""
    stage, setup = train_stage(pipeline, name), setup_of(pipeline, name)
    total = 0
    for key in model_keys(pipeline, name):
        steps = _steps(pipeline, stage, key)
        # The training at the best rate continues its trial; the other trials end there.
        others = [min(steps, steps_to_compare(stage) or steps)] * (len(stage.optimizer.rates) - 1)
        held_out = _tokenized(pipeline, plan, TaskId(stage.tokens, stage.text_validated(key)))
        for run in (steps, *others):
            total += run * setup.step_flops + setup.flops(_validations(stage, setup, held_out, steps=run))
    return total


def _validations(stage: TrainStage, setup: Setup, counts: Mapping[str, Any] | None, *, steps: int) -> Passes:
    """An upper bound of the passes of a run's validations: before the first step, every so many steps, and at the last.

    Args:
        counts: of the held-out set.
    """
    if stage.early_stopping is None or counts is None:
        return Passes()
    batches = -(-counts["windows"]["validation"] // stage.micro_batch_size)
    if stage.network is not None:
        batches += stage.network.projection.experts  # a batch has one expert: the last of each may not be full
    times = 1 + -(-steps // stage.early_stopping.evaluate_every)
    # All data-parallel ranks make the same number of passes, a multiple of the pipeline stages: empty batches fill them up.
    together = stage.parallel.data_parallel * stage.parallel.pipeline_parallel
    made = times * together * -(-batches // together)
    slots = made * stage.micro_batch_size * setup.context_length
    return Passes(evaluated=slots, evaluated_variants=made)


def _tokenized(pipeline: Pipeline, plan: Plan, name: TaskId) -> Mapping[str, Any] | None:
    """Counts by split of a set with the digest of the plan; None if it is not tokenized, or not in the plan."""
    if (planned := plan.get(name)) is None:
        return None
    marker = read_marker(artifact_folder(planned.elsewhere or Path(pipeline.root), *name, planned.digest))
    return marker.values if marker is not None and "windows" in marker.values else None


def _fill(pipeline: Pipeline, stage: TrainStage, keys: Sequence[str], plan: Plan) -> float | None:
    """The fraction of real tokens in the windows of the sets that runs read most; None if one is not tokenized."""
    fills = []
    context = tokenize_stage(pipeline, stage.tokens).context_length
    for source in dict.fromkeys(stage.text_read(key)[0] for key in keys):
        if (counts := _tokenized(pipeline, plan, TaskId(stage.tokens, source))) is None:
            return None
        fills.append(counts["tokens"]["train"] / (counts["windows"]["train"] * context))
    return sum(fills) / len(fills)


def _steps(pipeline: Pipeline, stage: TrainStage, key: str) -> int:
    """An upper bound of the steps of a run: a recipe depends on the size of the domain's set, if the config has it."""
    size = text_set(pipeline, key).train_tokens if stage.size_recipe else None
    return stage.steps if size is None else finetuning_recipe(stage, set_tokens=size).steps
