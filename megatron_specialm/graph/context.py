"""The arguments of a stage function besides its settings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_specialm.base.artifacts import Marker, finished_marker
from megatron_specialm.base.environment import World
from megatron_specialm.base.process_status import Item, ProcessStatus, counted
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.lineage import source_of
from megatron_specialm.graph.tasks import Task, TaskId


@dataclass(frozen=True)
class Context:
    """A task to run: its `inputs` (a folder each), its output `folder`, this process (`world`), and the heartbeat and stop flag
    (`process_status`)."""

    pipeline: Pipeline
    task: Task
    inputs: Mapping[TaskId, Path]
    root: Path
    folder: Path
    world: World
    threads: int
    process_status: ProcessStatus = field(default_factory=ProcessStatus)
    watch: Stopwatch = field(default_factory=Stopwatch)  # runs since this attempt at the task began

    @property
    def key(self) -> str:
        """The task's key: `generic` or a domain, optionally with a shard number or a learning rate; or, for evaluation and
        export, `STAGE.KEY` of the model, optionally with another set."""
        return self.task.id.key

    @property
    def model_key(self) -> str:
        """The key of the model that a train task makes or tries a learning rate for."""
        return source_of(self.key)

    def artifact(self, stage: str, key: str) -> Path:
        """The folder of an input. Only inputs that the graph declares can be read, so that digests cover all inputs."""
        assert TaskId(stage, key) in self.task.inputs, f"{self.task.id} reads {stage}/{key} without declaring it"
        return self.inputs[TaskId(stage, key)]

    def marker(self, stage: str, key: str) -> Marker:
        """An input's completion marker: its report values and cost."""
        return finished_marker(self.artifact(stage, key))

    def counted(
        self, items: Iterable[Item], *, unit: str, of: int | None = None, size: Callable[[Item], int] = lambda _: 1
    ) -> Iterable[Item]:
        """The same items, counted: long work logs its progress on rank 0 (`base/process_status.py`)."""
        if not self.world.is_first:
            return items
        return counted(items, self.folder, self.process_status, unit=unit, of=of, size=size)
