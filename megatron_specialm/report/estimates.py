"""The tables of `specialm check`: what a config would train, the memory of its layouts, and what can be trained how. They
follow from the arithmetic of `estimate/` and the tokenized text in the run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.artifacts import artifact_folder, read_marker
from megatron_specialm.base.gpus import GIB, dense_peak
from megatron_specialm.base.terminal import Column, Table, number, word
from megatron_specialm.config.finetuning import finetuning_recipe
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.estimate import capabilities
from megatron_specialm.estimate.capability import Capability
from megatron_specialm.estimate.flops import TYPICAL_UTILISATION, device_hours, keys_saved
from megatron_specialm.estimate.memory import memory_of
from megatron_specialm.estimate.parameters import count_parameters, count_trained_parameters
from megatron_specialm.estimate.setup import Passes, Setup
from megatron_specialm.graph.length import shared_steps
from megatron_specialm.graph.lineage import (
    distinct_setups,
    model_keys,
    setup_of,
    text_set,
    tokenize_stage,
    train_stage,
    train_stages,
)
from megatron_specialm.graph.plan import Plan
from megatron_specialm.graph.rates import steps_to_compare
from megatron_specialm.graph.tasks import TaskId

NO_PLAN: Plan = MappingProxyType({})


@dataclass(frozen=True)
class TrainingEstimate:
    """A train stage. Steps and slots are upper bounds, of the longest run: early stopping makes runs shorter, and sorting
    windows makes their padding less.

    Attributes:
        runs: trainings of the stage; each learning rate that is tried is one.
        parameters: of the exported model, for the vocabulary size in the config; an existing tokenizer has its own.
        active_parameters: those of them that compute a token: fewer for a mixture of experts.
        slots: token positions of a run, padding included (`_step_slots`).
        fill: the fraction of real tokens in the slots, at least; None if the set that is read most has not been tokenized.
        flops: of all runs, over slots; with validations if the held-out set has been tokenized. Attention of packed windows is
            taken over their mean length, or over the whole context if the set has not been tokenized.
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


def training_estimates(pipeline: Pipeline, machine: Accelerator, plan: Plan = NO_PLAN) -> list[TrainingEstimate]:
    """One per train stage."""
    estimates = []
    peak = dense_peak(machine.name)
    for name, stage in train_stages(pipeline).items():
        setup, keys = setup_of(pipeline, name), model_keys(pipeline, name)
        steps = max(_steps(pipeline, stage, key) for key in keys)
        flops, (step_slots, saved) = stage_flops(pipeline, name, plan), _step_slots(pipeline, name, keys, plan)
        fill = _fill(pipeline, stage, keys, plan)
        estimates.append(
            TrainingEstimate(
                stage=name,
                runs=len(keys) * len(stage.optimizer.rates),
                parameters=count_parameters(setup.model.base_config, setup.vocabulary_size),
                active_parameters=count_parameters(setup.model.base_config, setup.vocabulary_size, active=True),
                trained_parameters=count_trained_parameters(setup.model, setup.vocabulary_size),
                steps=steps,
                slots=steps * step_slots,
                fill=1.0 if setup.packing == "packed" and not setup.pads_packed_windows and fill is not None else fill,
                step_flops=setup.step_flops_of(step_slots, saved),
                flops=flops,
                gpu_hours=device_hours(flops, peak) if peak else None,
            )
        )
    return estimates


def stage_flops(pipeline: Pipeline, name: str, plan: Plan = NO_PLAN) -> int:
    """The FLOPs of all steps of all runs of a train stage, without those of a training that it continues: an upper bound except
    for packed windows (`_step_slots`). Validations are left out if the held-out text has not been tokenized yet."""
    stage, setup = train_stage(pipeline, name), setup_of(pipeline, name)
    continued = train_stage(pipeline, stage.continues) if stage.continues is not None else None
    taken_over = 0 if continued is None else shared_steps(stage, continued, ended=continued.steps)
    total = 0
    for key in model_keys(pipeline, name):
        steps = _steps(pipeline, stage, key)
        step_flops = setup.step_flops_of(*_step_slots(pipeline, name, [key], plan))
        # The training at the best rate continues its trial; the other trials end there.
        others = [min(steps, steps_to_compare(stage) or steps)] * (len(stage.optimizer.rates) - 1)
        held_out = _tokenized(pipeline, plan, TaskId(stage.tokens, stage.text_validated(key)))
        for run in (steps, *others):
            total += (run - taken_over) * step_flops + setup.flops(_validations(stage, setup, held_out, steps=run))
    return total


def _validations(stage: TrainStage, setup: Setup, counts: Mapping[str, Any] | None, *, steps: int) -> Passes:
    """The passes of a run's validations: before the first step, every so many steps, and at the last. Packed windows are
    planned as in `_step_slots`; otherwise it is an upper bound.

    Args:
        counts: of the held-out set.
    """
    if stage.early_stopping is None or counts is None:
        return Passes()
    batches = -(-counts["windows"]["validation"] // stage.micro_batch_size)
    if stage.network is not None:
        batches += stage.network.experts  # a batch has one expert: the last of each may not be full
    times = 1 + -(-steps // stage.early_stopping.evaluate_every)
    # All data-parallel ranks make the same number of passes, a multiple of the pipeline stages: empty batches fill them up.
    together = stage.parallel.data_parallel * stage.parallel.pipeline_parallel
    made = times * together * -(-batches // together)
    if setup.packing == "packed" and not setup.pads_packed_windows:
        tokens, windows = counts["tokens"]["validation"], counts["windows"]["validation"]
        saved = windows * keys_saved([tokens // max(1, windows)], setup.context_length)
        return Passes(evaluated=times * tokens, evaluated_variants=made, evaluated_saved=times * saved)
    slots = made * stage.micro_batch_size * setup.context_length
    return Passes(evaluated=slots, evaluated_variants=made)


def _step_slots(pipeline: Pipeline, name: str, keys: Sequence[str], plan: Plan) -> tuple[int, int]:
    """Token positions of a step, and the keys that attention saves in it: of packed windows, if the text has been tokenized,
    those of windows that all have the mean length, without padding, which is too little for attention where lengths
    differ; otherwise, and where packed windows have padding, of padded windows, an upper bound."""
    stage, setup = train_stage(pipeline, name), setup_of(pipeline, name)
    exact = setup.packing == "packed" and not setup.pads_packed_windows
    fill = _fill(pipeline, stage, keys, plan) if exact else None
    windows, context = setup.global_batch_size, setup.context_length
    slots = round(windows * context * (1.0 if fill is None else fill))
    return slots, windows * keys_saved([slots // windows], context)


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


def training_table(pipeline: Pipeline, machine: Accelerator, plan: Plan = NO_PLAN) -> Table:
    """A line per train stage; GPU hours where the machine's peak is known."""
    rows = training_estimates(pipeline, machine, plan)
    columns: list[Column[TrainingEstimate]] = [
        word("stage", lambda row: row.stage),
        number("runs", lambda row: str(row.runs)),
        number("weights", _weights),
        number("trained", lambda row: f"{row.trained_parameters / 1e6:,.1f}M"),
        number("steps", lambda row: f"{row.steps:,}"),
        number("slots/run", lambda row: f"{row.slots / 1e6:,.2f}M"),
        number("tokens/run", _tokens),
        number("FLOPs/step", lambda row: f"{row.step_flops:.2e}"),
        number("FLOPs", lambda row: f"{row.flops:.2e}"),
    ]
    if any(row.gpu_hours is not None for row in rows):
        columns.append(number(f"GPU hours at {TYPICAL_UTILISATION:.0%} MFU", lambda row: f"{row.gpu_hours:,.2f}"))
    return Table.of(rows, columns)


def _weights(row: TrainingEstimate) -> str:
    active = "" if row.active_parameters == row.parameters else f" ({row.active_parameters / 1e6:,.1f}M active)"
    return f"{row.parameters / 1e6:,.1f}M{active}"


def _tokens(row: TrainingEstimate) -> str:
    return "" if row.fill is None else f"{row.slots * row.fill / 1e6:,.2f}M ({row.fill:.0%})"


def memory_table(pipeline: Pipeline, machine: Accelerator) -> Table:
    """A column per distinct setup of the config, a line per part of the memory of the process that needs most."""
    setups, fused = distinct_setups(pipeline, None), machine.has_fused_layers
    memories = [memory_of(setup, fused=fused) for setup in setups.values()]
    lines = [["layout", *(setup.parallel.describe() for setup in setups.values())]]
    for part in ("weights", "gradients", "optimizer", "teacher", "derived"):
        lines.append([part, *(_gib(getattr(memory, part)) for memory in memories)])
    for policy in ("none", "selective", "full"):
        changed = (setup.changed({"parallel.recompute": policy}) for setup in setups.values())
        others = [memory_of(setup, fused=fused) for setup in changed]
        lines.append([f"activations, recompute {policy}", *(_gib(one.activations + one.working) for one in others)])
    lines.append(["in all, as set", *(_gib(memory.total) for memory in memories)])
    return Table("", ["GiB per process", *setups], lines, 1)


def _gib(count: int) -> str:
    return f"{count / GIB:,.3g}"


def capabilities_table() -> Table:
    """What can be trained in which layout."""
    columns: list[Column[Capability]] = [
        word("engine", lambda row: ", ".join(row.engines)),
        word("models", lambda row: row.models),
        word("feature", lambda row: row.feature),
        word("machine", lambda row: row.machine.needs),
        word("terms", lambda row: row.terms),
    ]
    return Table.of(capabilities.TABLE, columns)
