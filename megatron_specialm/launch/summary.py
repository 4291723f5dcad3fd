"""What a page would train, by arithmetic."""

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.terminal import Table
from megatron_specialm.base.throughput import dense_peak
from megatron_specialm.config import capabilities
from megatron_specialm.config.finetuning import finetuning_recipe
from megatron_specialm.config.lineage import distinct_setups, model_keys, setup_of, text_set, train_stage
from megatron_specialm.config.memory import memory_of
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import TrainStage

TYPICAL_UTILISATION = 0.4  # what others publish for models of this size; ours is measured by every training


def training_table(pipeline: Pipeline, machine: Accelerator) -> Table:
    """A row per train stage: for whom, its model, steps and tokens per run, FLOPs of all its runs, and the GPU hours that
    they take at `TYPICAL_UTILISATION` of the peak, where the machine's is known.

    Steps and tokens are of the longest run, and at most these: early stopping makes runs shorter, and windows shorter
    than the context hold fewer. Parameters are for the vocabulary asked for, which an existing tokenizer decides itself.
    """
    header = ["stage", "runs", "weights", "trained", "steps", "tokens/run", "FLOPs/step", "FLOPs"]
    lines: list[list[str]] = []
    peak = dense_peak(machine.name)
    if peak:
        header.append(f"GPU hours at {TYPICAL_UTILISATION:.0%} MFU")
    for name, stage in pipeline.stages.items():
        if not isinstance(stage, TrainStage):
            continue
        setup, keys = setup_of(pipeline, name), model_keys(pipeline, name)
        steps = [_steps(pipeline, stage, key) for key in keys]
        tokens = max(steps) * setup.global_batch_size * setup.context_length
        flops = training_flops(pipeline, name)
        parameters = setup.model.plain.parameters(setup.vocabulary_size)
        trained = setup.model.trained_parameters(setup.vocabulary_size)
        hours = [f"{planned_hours(flops, peak):,.2f}"] if peak else []
        lines.append([
            name, str(len(keys)), f"{parameters / 1e6:,.1f}M", f"{trained / 1e6:,.1f}M", f"{max(steps):,}",
            f"{tokens / 1e6:,.2f}M", f"{setup.step_flops:.2e}", f"{flops:.2e}", *hours,
        ])  # fmt: skip
    return Table("", header, lines, 1)


def training_flops(pipeline: Pipeline, name: str) -> int:
    """FLOPs of all runs of a train stage, at most."""
    steps = sum(_steps(pipeline, train_stage(pipeline, name), key) for key in model_keys(pipeline, name))
    return steps * setup_of(pipeline, name).step_flops


def planned_hours(flops: float, peak: float) -> float:
    """GPU hours that so many FLOPs take on devices of this peak (FLOP/s)."""
    return flops / (TYPICAL_UTILISATION * peak) / 3600


def _steps(pipeline: Pipeline, stage: TrainStage, key: str) -> int:
    """Steps of one run, at most: a recipe goes by the size of the domain's set, where the page says it."""
    size = text_set(pipeline, key).train_tokens if stage.recipe else None
    return stage.steps if size is None else finetuning_recipe(stage, set_tokens=size).steps


def memory_table(pipeline: Pipeline, machine: Accelerator) -> Table:
    """A column per setup of the page: the layout, and what the process that needs most needs of memory."""
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
    """What can be trained in which layout: `config/capabilities.py` for a reader."""
    rows = capabilities.rows()
    return Table("", list(rows[0]), [list(row.values()) for row in rows], len(rows[0]))
