"""What a stage function is given, for tests that call one themselves."""

from pathlib import Path

from megatron_specialm.base.artifacts import artifact_link
from megatron_specialm.base.environment import ALONE, World
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.tasks import Task


def make_context(pipeline: Pipeline, task: Task, root: Path, folder: Path, world: World = ALONE) -> Context:
    """A context that reads what users see of the task's inputs."""
    inputs = {name: artifact_link(root, *name) for name in task.inputs}
    return Context(pipeline, task, inputs, root, folder, world, threads=1)
