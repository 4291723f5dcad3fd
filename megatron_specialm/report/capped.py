"""Which fine-tunings of a plan their cap ended instead of early stopping: as the trainings' markers say."""

from collections.abc import Mapping
from pathlib import Path

from megatron_specialm.base.artifacts import artifact_folder, read_marker
from megatron_specialm.config.finetuning import Capped, capped_warning
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.lineage import train_stages
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.tasks import TaskId


def capped_warnings(pipeline: Pipeline, plan: Mapping[TaskId, PlannedTask], root: Path) -> list[str]:
    """A warning for each stage that has such models, of those that the plan has and that are done by now. A trial that its
    cap ended is a model's if it was taken; the log of any other says so."""
    warnings = []
    for name, stage in train_stages(pipeline).items():
        found = []
        for task, planned in plan.items():
            wanted = task.stage == name and planned.task.rate is None
            marker = read_marker(artifact_folder(root, *task, planned.digest)) if wanted else None
            if marker and marker.values.get("capped"):
                found.append(Capped(task.key, marker.values["steps"], marker.values["best_step"]))
        if found:
            warnings.append(capped_warning(name, stage, found))
    return warnings
