"""What a config would train, by arithmetic; and by what the run folder has of tokenized text, where it has."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.artifacts import artifact_folder, read_marker
from megatron_specialm.base.terminal import Table
from megatron_specialm.base.throughput import dense_peak
from megatron_specialm.config.finetuning import finetuning_recipe
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.estimate import capabilities
from megatron_specialm.estimate.memory import memory_of
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
TYPICAL_UTILISATION = 0.4  # what others publish for models of this size; ours is measured by every training


def training_table(pipeline: Pipeline, machine: Accelerator, plan: Plan = NO_PLAN) -> Table:
    """A row per train stage: for whom, its model, steps and tokens per run, FLOPs of all its runs (each learning rate that is
    tried is one), and the GPU hours that
    they take at `TYPICAL_UTILISATION` of the peak, where the machine's is known.

    Steps, slots and tokens are of the longest run, and at most these: early stopping makes runs shorter. Slots are what
    windows take, and FLOPs are of; the real tokens in them, and their share, are told where the run folder has the set
    that is read most, as the plan wants it. FLOPs have the validations in them where it has the set that is held out.
    Parameters are for the vocabulary asked for, which an existing tokenizer decides itself.
    """
    header = ["stage", "runs", "weights", "trained", "steps", "slots/run", "tokens/run", "FLOPs/step", "FLOPs"]
    lines: list[list[str]] = []
    peak = dense_peak(machine.name)
    if peak:
        header.append(f"GPU hours at {TYPICAL_UTILISATION:.0%} MFU")
    for name, stage in train_stages(pipeline).items():
        setup, keys = setup_of(pipeline, name), model_keys(pipeline, name)
        runs = len(keys) * len(stage.optimizer.rates)
        steps = [_steps(pipeline, stage, key) for key in keys]
        slots = max(steps) * setup.global_batch_size * setup.context_length
        tokens = _tokens(slots, _fill(pipeline, stage, keys, plan))
        flops = training_flops(pipeline, name, plan)
        parameters = setup.model.plain.parameters(setup.vocabulary_size)
        trained = setup.model.trained_parameters(setup.vocabulary_size)
        hours = [f"{planned_hours(flops, peak):,.2f}"] if peak else []
        lines.append([
            name, str(runs), f"{parameters / 1e6:,.1f}M", f"{trained / 1e6:,.1f}M", f"{max(steps):,}",
            f"{slots / 1e6:,.2f}M", tokens, f"{setup.step_flops:.2e}", f"{flops:.2e}", *hours,
        ])  # fmt: skip
    return Table("", header, lines, 1)


def training_flops(pipeline: Pipeline, name: str, plan: Plan = NO_PLAN) -> int:
    """FLOPs of all runs of a train stage, at most; those of its validations are left out where the held-out text has not
    been tokenized yet."""
    stage, setup = train_stage(pipeline, name), setup_of(pipeline, name)
    total = 0
    for key in model_keys(pipeline, name):
        steps = _steps(pipeline, stage, key)
        # The training at the best rate goes on from its trial; at the others it ends there.
        others = [min(steps, steps_to_compare(stage) or steps)] * (len(stage.optimizer.rates) - 1)
        held_out = _tokenized(pipeline, plan, TaskId(stage.tokens, stage.text_validated(key)))
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
    if stage.network is not None:
        batches += stage.network.projection.experts  # a batch is of one expert: each may end with one that is not full
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
    for source in dict.fromkeys(stage.text_read(key)[0] for key in keys):
        if (counts := _tokenized(pipeline, plan, TaskId(stage.tokens, source))) is None:
            return None
        fills.append(counts["tokens"]["train"] / (counts["windows"]["train"] * context))
    return sum(fills) / len(fills)


def _tokens(slots: int, fill: float | None) -> str:
    return "" if fill is None else f"{slots * fill / 1e6:,.2f}M ({fill:.0%})"


def planned_hours(flops: float, peak: float) -> float:
    """GPU hours that so many FLOPs take on devices of this peak (FLOP/s)."""
    return flops / (TYPICAL_UTILISATION * peak) / 3600


def _steps(pipeline: Pipeline, stage: TrainStage, key: str) -> int:
    """Steps of one run, at most: a recipe goes by the size of the domain's set, where the config says it."""
    size = text_set(pipeline, key).train_tokens if stage.size_recipe else None
    return stage.steps if size is None else finetuning_recipe(stage, set_tokens=size).steps


def memory_table(pipeline: Pipeline, machine: Accelerator) -> Table:
    """A column per setup of the config: the layout, and what the process that needs most needs of memory."""
    setups = distinct_setups(pipeline, None)
    fused = machine.has_fused_layers
    memories = [memory_of(setup, fused=fused) for setup in setups.values()]
    lines = [["layout", *(setup.parallel.describe() for setup in setups.values())]]
    for part in ("weights", "gradients", "optimizer", "teacher", "derived"):
        lines.append([part, *(_gib(getattr(memory, part)) for memory in memories)])
    for recompute in ("none", "selective", "full"):
        others = [memory_of(setup.recomputing(recompute), fused=fused) for setup in setups.values()]
        lines.append([f"activations, recompute {recompute}", *(_gib(one.activations + one.working) for one in others)])
    lines.append(["in all, as set", *(_gib(memory.total) for memory in memories)])
    return Table("", ["GiB per process", *setups], lines, 1)


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3g}"


def capabilities_table() -> Table:
    """What can be trained in which layout: `estimate/capabilities.py` for a reader."""
    rows = capabilities.rows()
    return Table("", list(rows[0]), [list(row.values()) for row in rows], len(rows[0]))
