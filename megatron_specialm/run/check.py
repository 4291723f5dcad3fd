"""All mistakes of a config that can be found before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.accelerator import Accelerator, find_accelerator, planned_machine
from megatron_specialm.base.artifacts import ARTIFACTS
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.file_hashes import find_parts, with_made_by_hint
from megatron_specialm.graph.plan import PlannedTask, make_plan
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.preflight import lacks, read_first_documents, refuse_too_few_documents
from megatron_specialm.run.reuse import refuse_other_folders


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
