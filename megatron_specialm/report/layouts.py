"""What `specialm check --gpu GPU --nodes N` prints: the fastest layouts, and what a step's time consists of."""

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.gpus import GIB, utilisation
from megatron_specialm.base.terminal import Column, Table, number, word
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.estimate.capabilities import violation
from megatron_specialm.estimate.hardware import assumptions
from megatron_specialm.estimate.layouts import Candidate, Layouts, find_layouts, nodes_needed
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.estimate.step_time import Part
from megatron_specialm.graph.lineage import distinct_setups, setup_of, train_stage, train_stages

SHOWN = 10
WAITS = ("pipeline bubble", "waiting for kernel launches")
COMMUNICATION = (
    "tensor parallel collectives", "context parallel exchange", "expert all-to-all", "pipeline messages",
    "gradient reduction", "parameter gathering",
)  # fmt: skip


def layout_tables(pipeline: Pipeline, node: Accelerator, nodes: int, stage: str | None) -> list[Table | str]:
    """For each distinct setup, or that of one stage: its fastest layouts, the parts of the fastest one's step, and the settings
    that make it; or in a line why there is none.

    Args:
        node: as `planned_machine` gives it.

    Raises:
        ConfigError: there is no such stage.
        MachineError: no setup has a layout.
    """
    printed: list[Table | str] = []
    refused: list[str] = []
    for name, setup in distinct_setups(pipeline, stage).items():
        if setup.parallel.engine != "megatron":
            refused.append(
                f"stages.{name}: no layouts are predicted for engine {setup.parallel.engine}: set engine: megatron"
            )
            continue
        found = find_layouts(setup, node, nodes, checkpoint_every=train_stage(pipeline, name).checkpoint.every)
        if found.fastest:
            printed += _proposal(pipeline, name, setup, found, node, nodes)
        else:
            refused.append(f"stages.{name}: {_why_none(setup, node, nodes, found)}")
    if not printed:
        raise MachineError(refused[0])
    return [*printed, *refused, assumptions()]


def _proposal(
    pipeline: Pipeline, name: str, setup: Setup, found: Layouts, node: Accelerator, nodes: int
) -> list[Table | str]:
    alike = [other for other in train_stages(pipeline) if other != name and setup_of(pipeline, other) == setup]
    also = f", and {', '.join(alike)}" if alike else ""
    best = found.fastest[0]
    gpus = nodes * node.gpus
    columns: list[Column[Candidate]] = [
        word("layout", lambda one: one.setup.parallel.describe()),
        number("micro-batch", lambda one: str(one.setup.micro_batch_size)),
        number("GiB", lambda one: f"{one.memory / GIB:.1f}"),
        number("ms/step", lambda one: f"{one.time.total * 1e3:,.1f}"),
        number("slots/s", lambda one: f"{_slots(one.setup) / one.time.total:,.0f}"),
        number("MFU", lambda one: _utilisation(one, node.name, gpus)),
        number("communication", lambda one: _share(one, COMMUNICATION)),
        number("bubble, launches", lambda one: _share(one, WAITS)),
    ]
    shown = found.fastest[:SHOWN]
    left_out = found.fitting - len(shown)
    note = f"{left_out:,} more fit, or differ in micro-batch, chunks or recomputation; {found.too_large:,} need more memory"
    note += "; windows are counted as full"
    if len({one.setup.packing for one in shown}) > 1:
        note += ", and with CP they are padded, which the others avoid by packing"
    if setup.packing == "sorted":
        note += "; packing: packed allows pipeline parallelism, too"
    parts: list[Column[Part]] = [
        word("part of the step", lambda part: part.name),
        number("ms", lambda part: f"{part.seconds * 1e3:,.2f}"),
        number("share", lambda part: f"{part.seconds / best.time.total:.1%}"),
        number("of", lambda part: f"{part.amount:.2e} {part.unit}" if part.unit else ""),
    ]
    overrides = " ".join(f"stages.{name}.{key}={str(value).lower()}" for key, value in best.change.settings.items())
    return [
        Table.of(shown, columns, title=f"{name}{also}: layouts of {_nodes(nodes, node)}, predicted", note=note),
        Table.of(best.time.parts, parts, title=best.setup.parallel.describe()),
        f"{name}: {overrides or 'the config has the fastest layout'}",
    ]


def _why_none(setup: Setup, node: Accelerator, nodes: int, found: Layouts) -> str:
    on = _nodes(nodes, node)
    if not found.too_large:
        plain = {
            "parallel.tensor_parallel": 1,
            "parallel.sequence_parallel": False,
            "parallel.data_parallel": nodes * node.gpus,
        }
        return f"no layout of {on} is allowed; of replicas alone, because {violation(setup.changed(plain))}"
    if needed := nodes_needed(setup, node, nodes):
        least, change = needed
        return f"no layout fits {on}: set --nodes {least}, where this fits: {change.describe()}"
    return f"no layout fits {on} or more: use a smaller model, or GPUs with more memory"


def _nodes(nodes: int, node: Accelerator) -> str:
    return f"{nodes} node{'s' if nodes > 1 else ''} of {node.gpus} {node.name}"


def _slots(setup: Setup) -> int:
    return setup.global_batch_size * setup.context_length


def _utilisation(one: Candidate, model: str, gpus: int) -> str:
    used = utilisation(flops=one.setup.step_flops, seconds=one.time.total, devices=gpus, device_name=model)
    return f"{used:.1%}"


def _share(one: Candidate, names: tuple[str, ...]) -> str:
    return f"{sum(map(one.time.seconds, names)) / one.time.total:.1%}"
