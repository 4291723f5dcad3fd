"""What `specialm check --gpu GPU --nodes N` prints: the fastest layouts, and what a step's time consists of."""

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.gpus import GIB, utilisation
from megatron_specialm.base.terminal import Column, Table, number, word
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.estimate.hardware import assumptions
from megatron_specialm.estimate.layouts import Candidate, find_layouts, nodes_needed
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.estimate.step_time import Part
from megatron_specialm.graph.lineage import distinct_setups, setup_of, train_stage, train_stages

SHOWN = 10
WAITS = ("pipeline bubble", "waiting for kernel launches")
COMMUNICATION = (
    "tensor parallel collectives", "context parallel exchange", "expert all-to-all", "pipeline messages",
    "gradient reduction", "parameter gathering",
)  # fmt: skip


def layout_tables(pipeline: Pipeline, machine: Accelerator, nodes: int, stage: str | None) -> list[Table | str]:
    """For each distinct setup, or that of one stage: its fastest layouts, the parts of the fastest one's step, and the settings
    that make it. Lines of text are between the tables.

    Args:
        machine: as `planned_machine` gives it.

    Raises:
        ConfigError: there is no such stage, or it has another engine than Megatron.
        MachineError: no layout fits.
    """
    printed: list[Table | str] = []
    for name, setup in distinct_setups(pipeline, stage).items():
        printed += _proposal(pipeline, name, setup, machine, nodes)
    return [*printed, assumptions()]


def _proposal(pipeline: Pipeline, name: str, setup: Setup, machine: Accelerator, nodes: int) -> list[Table | str]:
    found = find_layouts(setup, machine, nodes, checkpoint_every=train_stage(pipeline, name).checkpoint.every)
    on = f"{nodes} node{'s' if nodes > 1 else ''} of {machine.gpus} {machine.name}"
    if not found.fastest:
        raise MachineError(f"stages.{name}: {_why_none(setup, machine, nodes, found.too_large, on)}")
    alike = [other for other in train_stages(pipeline) if other != name and setup_of(pipeline, other) == setup]
    also = f", and {', '.join(alike)}" if alike else ""
    best = found.fastest[0]
    gpus = nodes * machine.gpus
    columns: list[Column[Candidate]] = [
        word("layout", lambda one: one.setup.parallel.describe()),
        number("micro-batch", lambda one: str(one.setup.micro_batch_size)),
        number("GiB", lambda one: f"{one.memory / GIB:.1f}"),
        number("ms/step", lambda one: f"{one.time.total * 1e3:,.1f}"),
        number("slots/s", lambda one: f"{_slots(one.setup) / one.time.total:,.0f}"),
        number("MFU", lambda one: _utilisation(one, machine, gpus)),
        number("communication", lambda one: _share(one, COMMUNICATION)),
        number("bubble, launches", lambda one: _share(one, WAITS)),
    ]
    shown = found.fastest[:SHOWN]
    left_out = found.fitting - len(shown)
    note = f"{left_out:,} more fit, or differ in micro-batch, chunks or recomputation; {found.too_large:,} need more memory"
    parts: list[Column[Part]] = [
        word("part of the step", lambda part: part.name),
        number("ms", lambda part: f"{part.seconds * 1e3:,.2f}"),
        number("share", lambda part: f"{part.seconds / best.time.total:.1%}"),
        number("of", lambda part: f"{part.amount:.2e} {part.unit}" if part.unit else ""),
    ]
    overrides = " ".join(f"stages.{name}.{key}={str(value).lower()}" for key, value in best.change.settings.items())
    return [
        Table.of(shown, columns, title=f"{name}{also}: layouts of {on}, predicted", note=note),
        Table.of(best.time.parts, parts, title=best.setup.parallel.describe()),
        f"{name}: {overrides or 'the config has the fastest layout'}",
    ]


def _why_none(setup: Setup, machine: Accelerator, nodes: int, too_large: int, on: str) -> str:
    if needed := nodes_needed(setup, machine, nodes):
        least, change = needed
        return f"no layout fits {on}: set --nodes {least}, where one does: {change.describe()}"
    if too_large:
        return f"no layout fits {on} or more: use a smaller model, or GPUs with more memory"
    return f"no layout of {on} is allowed: choose nodes whose GPUs divide global_batch_size {setup.global_batch_size}"


def _slots(setup: Setup) -> int:
    return setup.global_batch_size * setup.context_length


def _utilisation(one: Candidate, machine: Accelerator, gpus: int) -> str:
    used = utilisation(flops=one.setup.step_flops, seconds=one.time.total, devices=gpus, device_name=machine.name)
    return f"{used:.1%}"


def _share(one: Candidate, names: tuple[str, ...]) -> str:
    return f"{sum(map(one.time.seconds, names)) / one.time.total:.1%}"
