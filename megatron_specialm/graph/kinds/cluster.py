"""The kind `cluster`: one task, which fits centroids to the generic set's vectors."""

from collections.abc import Iterator
from typing import ClassVar

from megatron_specialm.config.schema import ClusterStage, Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.stage_kind import Placement, References, StageKind, register
from megatron_specialm.graph.tasks import Task, TaskId


@register
class ClusterKind(StageKind[ClusterStage]):
    kind = "cluster"
    makes = "clusters"
    references: ClassVar[References] = {"vectors": "vectors"}
    placement: ClassVar[Placement] = {"processes": True}
    ranks_by = "mpi"  # k-means adds over MPI, whatever launches trainings

    def tasks(self, pipeline: Pipeline, name: str, stage: ClusterStage) -> Iterator[Task]:
        yield Task(TaskId(name, GENERIC), (TaskId(stage.vectors, GENERIC),), {}, None)

    def processes(self, stage: ClusterStage) -> int:
        return stage.processes
