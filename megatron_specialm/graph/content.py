"""What of settings stands in a digest: those that decide something, and are not at the default that they were introduced with.

So a new setting leaves every digest as it was, and so does a value that spells out the default. A default that changes later
is declared, and the first one goes on to be what is left out:

    warmup_steps: Annotated[NonNegativeInt, Introduced(1_000)] = 500

Whoever wrote 1_000 keeps what was made with it, and whoever wrote nothing gets another digest, as the value is another now.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from megatron_specialm.config.base import Settings

# Settings that say where, in what portions and how talkatively a task runs, not what it computes; and others that are in
# the digest under another name.
PLACEMENT: dict[str, Any] = {
    "parallel": True, "workers": True, "micro_batch_size": True, "batch_size": True, "trial": {"micro_batch_size": True},
    "processes": True, "checkpoint": True, "log_every": True, "tensorboard": True, "wandb_project": True,
    "runtime": True,
    "models": True, "clusters": True,  # which models or experts there are says nothing of one of them, and inputs are named
    "path": True, "encoder": {"model": True},  # the content is in it, whatever its place
    "method": True,  # a name in tables and on model cards: the export's matter
}  # fmt: skip


@dataclass(frozen=True)
class Introduced:
    """Of a field whose default is another one now: the default that it was introduced with, as JSON has it."""

    default: Any


def introduced_default(field: FieldInfo) -> Any:
    """The default that a field was introduced with, as `content_of` has its values; `...` where the field is required."""
    declared = [mark.default for mark in field.metadata if isinstance(mark, Introduced)]
    if declared:
        return declared[0]
    if field.is_required():
        return ...
    default = field.get_default(call_default_factory=True)
    # Of settings inside, what they were given: a default of theirs that changes is declared there.
    return (
        default.model_dump(mode="json", exclude_unset=True)
        if isinstance(default, Settings)
        else to_jsonable_python(default)
    )


def content_of(settings: Settings, *, leave_out: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings as JSON, without those at the default that they were introduced with.

    Args:
        leave_out: fields that decide nothing, as in `PLACEMENT`: True, or of settings inside a mapping of the same form.
    """
    values, found = settings.model_dump(mode="json"), {}
    for name, field in type(settings).model_fields.items():
        left, value = (leave_out or {}).get(name, {}), getattr(settings, name)
        if left is True or name not in values:  # a llama has no `activation`
            continue
        part = content_of(value, leave_out=left) if isinstance(value, Settings) else values[name]
        if part != introduced_default(field):
            found[name] = part
    return found
