"""The tables of `specialm check`: what a config would train, the memory of its layouts, and what can be trained how."""

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.terminal import Column, Table, number, word
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.estimate import capabilities
from megatron_specialm.estimate.capabilities import Capability
from megatron_specialm.estimate.flops import TYPICAL_UTILISATION
from megatron_specialm.report.estimates import (
    NO_PLAN,
    RECOMPUTE,
    Plan,
    TrainingEstimate,
    memory_estimates,
    training_estimates,
)

GIB = 2**30


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
    """A column per setup of the config, a line per part of the memory."""
    estimates = memory_estimates(pipeline, machine)
    lines = [["layout", *(estimate.layout for estimate in estimates)]]
    for part in ("weights", "gradients", "optimizer", "teacher", "derived"):
        lines.append([part, *(_gib(getattr(estimate.memory, part)) for estimate in estimates)])
    for policy in RECOMPUTE:
        memories = [estimate.by_recompute[policy] for estimate in estimates]
        lines.append([f"activations, recompute {policy}", *(_gib(one.activations + one.working) for one in memories)])
    lines.append(["in all, as set", *(_gib(estimate.memory.total) for estimate in estimates)])
    return Table("", ["GiB per process", *(estimate.stage for estimate in estimates)], lines, 1)


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
