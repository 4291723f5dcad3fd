"""The digest of a task: SHA-256 over all that decides its result.

These are its own settings, the other settings of the config that it reads, its seed, its inputs' digests, and the content of
the files it reads, by their role; not where or on how many processes it runs, nor the names of files. A setting at the default
that it was introduced with is left out (`graph/content.py`), so that a new setting leaves every digest as it was.
"""

from collections.abc import Mapping
from typing import Any

from megatron_specialm.base.files import sha256_json
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.content import content_of
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import Task, TaskId

# Raise it when the meaning of artifacts changes: existing ones are then made again. A default that changes is declared
# (`graph/content.py`).
ARTIFACT_FORMAT = 5


def digest_content(
    pipeline: Pipeline, task: Task, *, inputs: Mapping[TaskId, str], file_hashes: Mapping[str, str]
) -> dict[str, Any]:
    """All that decides the task's result, as JSON: what its digest is the SHA-256 of (`sha256_json`).

    Args:
        inputs: the digests of the task's inputs.
        file_hashes: for each role in the task's `files`, SHA-256 of the content.
    """
    stage = pipeline.stages[task.id.stage]
    kind = kind_of(stage)
    return {
        "format": ARTIFACT_FORMAT,
        "settings": content_of(kind.digested(stage, task), leave_out=kind.placement),
        "elsewhere": dict(task.elsewhere),
        "key": task.id.key,
        "seed": pipeline.seed_of_training if kind.uses_training_seed else pipeline.seed,
        "inputs": {str(name): inputs[name] for name in task.inputs},
        "files": {role: file_hashes[role] for role in task.files},
    }


def digest(pipeline: Pipeline, task: Task, *, inputs: Mapping[TaskId, str], file_hashes: Mapping[str, str]) -> str:
    """SHA-256 over all that decides the task's result; arguments as of `digest_content`."""
    return sha256_json(digest_content(pipeline, task, inputs=inputs, file_hashes=file_hashes))
