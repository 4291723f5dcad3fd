"""The digest of a task: SHA-256 over all that decides its result.

These are its own settings, the other settings of the config that it reads, its seed, its inputs' digests, and the content of
the files it reads, by their role; not where or on how many processes it runs, nor the names of files.

A setting at the default that it was introduced with is left out. So a new setting leaves every digest as it was, and so does a
config that spells out a default. A default that changes later is declared, and the first one is still what is left out:

    warmup_steps: Annotated[NonNegativeInt, Introduced(1_000)] = 500

A config that says 1_000 keeps its digests. One that leaves the setting out gets others, because its value has changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from megatron_specialm.base.files import sha256_json
from megatron_specialm.config.base import Settings
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import Task, TaskId

# Raise it when the meaning of artifacts changes: existing ones are then made again. A default that changes is declared
# (`Introduced`).
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


@dataclass(frozen=True)
class Introduced:
    """Marks a field whose default has changed: the default that it was introduced with, as JSON."""

    default: Any


def introduced_default(field: FieldInfo) -> Any:
    """The default that a field was introduced with, in the form of `content_of`; `...` for a required field."""
    declared = [mark.default for mark in field.metadata if isinstance(mark, Introduced)]
    if declared:
        return declared[0]
    if field.is_required():
        return ...
    default = field.get_default(call_default_factory=True)
    # For nested settings only the values that are given here: a changed default of theirs is declared in their class.
    return (
        default.model_dump(mode="json", exclude_unset=True)
        if isinstance(default, Settings)
        else to_jsonable_python(default)
    )


def content_of(settings: Settings, *, leave_out: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings as JSON, without those at the default that they were introduced with.

    Args:
        leave_out: fields to leave out, in the form of `StageKind.placement`: True, or for settings inside a mapping of the same
            form.
    """
    values, found = settings.model_dump(mode="json"), {}
    for name, field in type(settings).model_fields.items():
        left, value = (leave_out or {}).get(name, {}), getattr(settings, name)
        if left is True or name not in values:  # a model of family llama has no `activation`
            continue
        part = content_of(value, leave_out=left) if isinstance(value, Settings) else values[name]
        if part != introduced_default(field):
            found[name] = part
    return found
