"""Checks before anything runs: the text that a config names, and whether the machine can do its stages."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_specialm.base.accelerator import Accelerator, find_accelerator, host_memory_bytes, planned_machine
from megatron_specialm.base.artifacts import ARTIFACTS, artifact_folder, read_marker
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.gpus import GIB
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.data.documents import HUB, Documents
from megatron_specialm.estimate.capabilities import lacking
from megatron_specialm.estimate.capability import Refusal
from megatron_specialm.estimate.memory import memory_of, smallest_change
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.file_hashes import find_parts, with_made_by_hint
from megatron_specialm.graph.lineage import setup_of, sources, text_set, train_stages
from megatron_specialm.graph.plan import PlannedTask, make_plan
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.graph.validation import (
    documents_needed,
    refuse_too_little,
    too_little,
    validating_stages,
)
from megatron_specialm.run.reuse import refuse_other_folders


def read_first_documents(pipeline: Pipeline) -> None:
    """Find text that cannot be read, or lacks the `text_field`, before hours of work: read the first document of each set's
    training, validation and test files. Hubs are not accessed.

    Raises:
        DataError: as reading all documents would.
    """
    for files in (text_set(pipeline, source) for source in sources(pipeline)):
        for entries in (files.train, files.validation, files.test):
            local = [entry for entry in entries if not entry.startswith(HUB)]
            if local:
                next(Documents(local, text_field=files.text_field))


def refuse_too_few_documents(pipeline: Pipeline) -> None:
    """Find sets with too few documents to validate on, by reading no more than needed. Whether the tokens are enough is known
    after tokenizing. Hubs are not accessed.

    Raises:
        DataError: naming the set, the floor and what can be done.
    """
    for tokens, stage in pipeline.stages.items():
        for source in sources(pipeline) if kind_of(stage).makes == "tokens" else ():
            files, needed = text_set(pipeline, source), documents_needed(pipeline, tokens, source)
            entries = files.validation or files.train
            if any(entry.startswith(HUB) for entry in entries):
                continue
            found = sum(1 for _ in islice(Documents(entries, text_field=files.text_field), needed))
            if found < needed:
                raise too_little(pipeline, tokens, source, f"{found} document{'s' if found != 1 else ''}")


def refuse_too_little_held_out(
    pipeline: Pipeline, plan: Mapping[TaskId, PlannedTask], root: Path, *, stages: Collection[str]
) -> None:
    """Check sets that were tokenized earlier, perhaps for a config without a stage that validates on them.

    Args:
        stages: those that are to run.

    Raises:
        DataError: as the tokenize stage would.
    """
    for name, planned in plan.items():
        makes = kind_of(pipeline.stages[name.stage]).makes
        if makes != "tokens" or planned.task.shard or planned.is_to_do:
            continue
        marker = read_marker(artifact_folder(planned.elsewhere or root, *name, planned.digest))
        if marker is not None and not {*stages}.isdisjoint(validating_stages(pipeline, *name)):
            refuse_too_little(pipeline, *name, marker.values)


def refuse_what_the_machine_lacks(pipeline: Pipeline, *, stages: Collection[str], alone: bool = True) -> None:
    """Check the train stages that are to run.

    Args:
        alone: all their processes run on this machine; otherwise a launcher has spread them over nodes.

    Raises:
        MachineError: with the stage, what it needs, what the machine has, and a change that fits.
    """
    machine = find_accelerator()
    for name, reason in lacks(pipeline, machine, alone=alone):
        if name in stages:
            raise MachineError(reason)
    for name, stage in train_stages(pipeline).items() if alone and machine.gpus else ():
        if name in stages and stage.parallel.world_size > machine.gpus:
            raise MachineError(
                f"stages.{name}.parallel: {stage.parallel.describe()} takes {stage.parallel.world_size} processes, one per "
                f"GPU, and this machine has {machine.describe()}: lower it, or set CUDA_VISIBLE_DEVICES= to use the CPU"
            )


def refuse_what_gpus_lack(pipeline: Pipeline, gpu: str | None, *, stages: Collection[str]) -> None:
    """Before jobs are queued: check that train stages fit their GPUs. An unknown GPU (None) is not checked.

    Raises:
        ConfigError: the GPU is not in the table.
        MachineError: with the stage, what it needs, and a change that fits.
    """
    for name, reason in lacks(pipeline, planned_machine(gpu), alone=False) if gpu else ():
        if name in stages:
            raise MachineError(reason)


def lacks(pipeline: Pipeline, machine: Accelerator, *, alone: bool = True) -> Iterator[tuple[str, str]]:
    """The train stages that a machine cannot run, each with the reason in one line."""
    for name in train_stages(pipeline):
        setup = setup_of(pipeline, name)
        if refusal := lacking(setup, machine) or _too_large(setup, machine, alone=alone):
            yield name, f"stages.{name}: {refusal}"


def _too_large(setup: Setup, machine: Accelerator, *, alone: bool) -> Refusal | None:
    processes = setup.parallel.world_size if alone else 1  # on this machine, at least
    limit = machine.usable_bytes if machine.gpus else host_memory_bytes() // processes
    needed = memory_of(setup, fused=machine.has_fused_layers).total
    if needed <= limit:
        return None
    whose = f"{machine.name} has" if machine.gpus else f"{processes} processes on this machine have"
    change = smallest_change(setup, limit, fused=machine.has_fused_layers)
    remedy = change.describe() if change else "use a smaller model, or GPUs with more memory"
    return Refusal(f"a process needs {needed / GIB:.1f} GiB, and {whose} {limit / GIB:.1f} GiB for each", remedy)


@dataclass(frozen=True)
class Checked:
    """A config without mistakes.

    Attributes:
        machine: that it was checked for.
        tasks: how many it has.
        plan: of the run folder; empty where nothing is finished.
        lacking: why each stage that the machine cannot run cannot run there.
    """

    machine: Accelerator
    tasks: int
    plan: Mapping[TaskId, PlannedTask]
    lacking: list[str]


def check(pipeline: Pipeline, *, gpu: str | None) -> Checked:
    """Check the graph, the text and the machine.

    Args:
        gpu: check for a machine with such GPUs, not for this one.

    Raises:
        ConfigError: the config contradicts itself, or there is no such GPU in the table.
        DataError: text cannot be read, or is too little.
    """
    root = Path(pipeline.root)
    graph = build_graph(pipeline)
    refuse_other_folders(pipeline)
    with with_made_by_hint(pipeline.text):
        find_parts(graph.values(), root)
    read_first_documents(pipeline)
    refuse_too_few_documents(pipeline)
    machine = planned_machine(gpu) if gpu else find_accelerator()
    # Where nothing is finished, no text need be read.
    plan = make_plan(pipeline, root, keep_hashes=False) if (root / ARTIFACTS).is_dir() else {}
    return Checked(machine, len(graph), plan, [reason for _, reason in lacks(pipeline, machine)])
