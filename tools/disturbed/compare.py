"""Compare two runs of a config bit for bit, and find leftover files.

Disturbed runs repeat steps, so times and counted passes differ, as do clocks, host names and process ids. Everything else is
compared.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Progress, cost, and the cache of hashes. Progress is compared step by step; the others are not part of the result.
METRICS, SPENT = "metrics.jsonl", ("work.json", "README.md", "checked.json")
# Keys of JSON that are skipped: costs, attempts, and hashes of files, which are compared themselves.
LEFT_OUT = re.compile(r"seconds|flops|^(passes|cost|apart|time|incarnation|files|sha256)$")
STEP = re.compile(r"step_\d+$")
LEFTOVERS = re.compile(r"\.(tmp|mode)$|^progress\.json$")


def leftovers(root: Path) -> list[str]:
    """Temporary files that must not remain in a run folder without a running command."""
    return [f"{path} is left over" for path in sorted(root.rglob("*")) if LEFTOVERS.search(path.name)]


def different_results(one: Path, other: Path) -> list[str]:
    """Where the tables of two run folders differ, except costs."""
    return [
        f"{other / name} differs from {one / name}, not only in costs"
        for name in ("results.json", "ledger.json")
        if _parsed(one / name) != _parsed(other / name)
    ]


def different_artifacts(one: Path, other: Path, names: Iterable[tuple[str, str]]) -> list[str]:
    """Where the artifacts (stage, key) of two run folders differ."""
    return [
        difference for stage, key in names for difference in different_artifact(one / stage / key, other / stage / key)
    ]  # fmt: skip


def different_artifact(one: Path, other: Path) -> list[str]:
    """Where an artifact's folders differ. Of a training, the result and the losses are compared; its other checkpoints depend
    on when it was stopped."""
    ours, theirs = (dict(_compared(folder)) for folder in (one, other))
    only = [f"{name} is in {one if name in ours else other} alone" for name in sorted(ours.keys() ^ theirs.keys())]
    changed = [name for name in sorted(ours.keys() & theirs.keys()) if _content(ours[name]) != _content(theirs[name])]
    return only + [f"{other / name} differs from {one / name}" for name in changed]


def _compared(folder: Path) -> Iterator[tuple[str, Path]]:
    final = _parsed(folder / "result.json")["folder"] if (folder / "result.json").exists() else None
    for path in sorted(folder.rglob("*")):
        steps = [part for part in path.relative_to(folder).parts if STEP.fullmatch(part)]
        if path.is_file() and path.name not in SPENT and steps in ([], [final]):
            yield path.relative_to(folder).as_posix(), path


def _content(path: Path) -> Any:
    if path.name == METRICS:
        return _losses(path)
    return _parsed(path) if path.suffix == ".json" else path.read_bytes()


def _parsed(path: Path) -> Any:
    return _without_costs(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _without_costs(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_costs(part) for key, part in value.items() if not LEFT_OUT.search(key)}
    return [_without_costs(part) for part in value] if isinstance(value, list) else value


def _losses(path: Path) -> dict[int, float]:
    """The last loss of each step; a killed attempt may leave an incomplete last line."""
    losses = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in record:
            losses[record["step"]] = record["loss"]
    return losses
