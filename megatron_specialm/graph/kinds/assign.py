"""The kind `assign`: a task for each set of text, or for each shard of one and one that gathers them. Where a training is
validated by clusters, one more assigns the generic set's held-out windows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from megatron_specialm.config.schema import AssignStage, Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import HELD_OUT, held_out_assignments
from megatron_specialm.graph.stage_kind import Placement, References, StageKind, register
from megatron_specialm.graph.tasks import Task, TaskId
from megatron_specialm.graph.text_tasks import text_tasks


@register
class AssignKind(StageKind[AssignStage]):
    kind = "assign"
    makes = "assignment"
    references: ClassVar[References] = {"clusters": "clusters", "vectors": "vectors"}
    placement: ClassVar[Placement] = {"clusters": True}  # an input, which the digest has by name

    def tasks(self, pipeline: Pipeline, name: str, stage: AssignStage) -> Iterator[Task]:
        clusters = TaskId(stage.clusters, GENERIC)
        for task in text_tasks(pipeline, name):
            yield replace(task, inputs=task.inputs or (clusters, TaskId(stage.vectors, task.id.key)))
        if name in held_out_assignments(pipeline):
            yield Task(TaskId(name, HELD_OUT), (clusters, TaskId(stage.vectors, HELD_OUT)), {}, None)
