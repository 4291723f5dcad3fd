"""Why finished work is stale: the differences between what it was made from and what the task is made from now.

Both are the content of a digest (`digest_content` of `graph/digests.py`); an artifact's label keeps its own.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json import dumps
from typing import Any

from megatron_specialm.base.printing import first_of
from megatron_specialm.config.base import Settings
from megatron_specialm.config.text import TextSet
from megatron_specialm.graph.digests import introduced_default
from megatron_specialm.graph.tasks import MODELS

SHOWN_NAMES, SHOWN_CHARACTERS = 4, 60  # names of inputs and characters of a value that a message shows


@dataclass(frozen=True)
class Reasons:
    """What has changed.

    own: changes of the task itself, such as `optimizer.learning_rate: 0.002 -> 0.003`.
    inputs: names of inputs, `stage/key`, by what happened to them (`redone`, `read no longer`, ...).
    """

    own: Sequence[str] = ()
    inputs: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        """All changes, for one task."""
        inputs = (
            f"{first_of(names, SHOWN_NAMES)} {'is' if len(names) == 1 else 'are'} {how}"
            for how, names in self.inputs.items()
        )
        return "; ".join([*self.own, *inputs])

    def by_stage(self) -> str:
        """All changes, with inputs named by their stages: equal for tasks of a stage that are stale for the same reason."""
        stages = {how: [name.partition("/")[0] for name in names] for how, names in self.inputs.items()}
        return str(Reasons(self.own, {how: list(dict.fromkeys(names)) for how, names in stages.items()}))


def find_reasons(
    old: Mapping[str, Any], new: Mapping[str, Any], stage: Settings, *, redone: Collection[str]
) -> Reasons:
    """Compare the digest content of finished work with that of its task now.

    Args:
        stage: the task's settings, of which `new` has those that are not at their defaults.
        redone: the tasks, as `stage/key`, that are to be redone themselves.
    """
    own = [
        *_changes(old.get("settings", {}), new["settings"], stage),
        *_changes(old.get("elsewhere", {}), new["elsewhere"], TextSet.model_construct()),
        *_files(old.get("files", {}), new["files"]),
        *(
            f"{what}: {_value(old.get(key))} -> {_value(new[key])}"
            for key, what in (("seed", "seed"), ("format", "the format of artifacts"))
            if old.get(key) != new[key]
        ),
    ]
    inputs: dict[str, list[str]] = {}
    for name, how in _inputs(old.get("inputs", {}), new["inputs"], redone):
        inputs.setdefault(how, []).append(name)
    return Reasons(own, inputs)


def redo_seconds(old: Mapping[str, Any], new: Mapping[str, Any], *, spent: float) -> float:
    """An estimate of the device-seconds to redo work: those of the old work, scaled by the number of windows to train on where
    the settings say how many."""
    before, after = _windows(old), _windows(new)
    return spent * after / before if before and after else spent


def _windows(made_from: Mapping[str, Any]) -> int | None:
    settings = made_from.get("settings", {})
    if "steps" not in settings or "early_stopping" in settings:
        return None
    windows: int = settings["steps"] * settings["global_batch_size"]
    return windows


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], settings: Settings, inside: str = "") -> Iterator[str]:
    """Dotted keys with both values. A missing key is at the default that it was introduced with."""
    another_kind = old.get("kind") != new.get("kind")  # then other keys cannot be compared
    fields = type(settings).model_fields
    for name in ["kind"] if another_kind else dict.fromkeys((*new, *old)):
        default = introduced_default(fields[name]) if name in fields else None
        before, after, part = old.get(name, default), new.get(name, default), getattr(settings, name, None)
        if isinstance(before, dict) and isinstance(after, dict) and isinstance(part, Settings):
            yield from _changes(before, after, part, f"{inside}{name}.")
        elif before != after:
            yield f"{inside}{name}: {_value(before)} -> {_value(after)}"


def _value(value: Any) -> str:
    if value is None or value is ...:
        return "unset"
    text = value if isinstance(value, str) and value.isprintable() else dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def _files(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for role in dict.fromkeys((*new, *old)):
        what = f"the {'files' if role in MODELS else 'text'} of `{role}`"
        if role not in old or role not in new:
            yield f"it reads {what} {'too' if role in new else 'no longer'}"
        elif old[role] != new[role]:
            yield f"{what} changed"


def _inputs(old: Mapping[str, str], new: Mapping[str, str], redone: Collection[str]) -> Iterator[tuple[str, str]]:
    """Names of inputs, and what happened to each."""
    for name, digest in new.items():
        if name not in old:
            yield name, "read too"
        elif old[name] != digest:
            yield name, "redone" if name in redone else "another"
    for name in old:
        if name not in new:
            yield name, "read no longer"
