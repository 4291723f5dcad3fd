"""Nodes that failed a preflight: a run folder's jobs leave them out from then on, for a day."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.base.lock import hold_folder

NAME = "nodes.json"
KEPT_SECONDS = 86_400.0  # administrators repair nodes; one that still fails is found again


@dataclass(frozen=True)
class _Excluded:
    """Why a node is left out, and since when, in Unix time."""

    reason: str
    time: float


def excluded_nodes(folder: Path, *, now: float | None = None) -> list[str]:
    """The nodes that failed within the last day, sorted; by a clock that was wrong, a day ahead at most."""
    now = time.time() if now is None else now
    return sorted(node for node, entry in _read(folder).items() if abs(now - entry.time) < KEPT_SECONDS)


def exclude_node(folder: Path, node: str, *, reason: str) -> None:
    """Leave a node out from now on."""
    with hold_folder(folder, wait_seconds=60):  # jobs of one run may find bad nodes at a time
        nodes = {**_read(folder), node: _Excluded(reason, time.time())}
        write_json(folder / NAME, {name: asdict(entry) for name, entry in nodes.items()})


def _read(folder: Path) -> dict[str, _Excluded]:
    path = folder / NAME
    return read_json(path, dict[str, _Excluded], remedy="put it right or remove it") if path.exists() else {}
