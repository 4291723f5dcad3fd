"""Nodes that failed a preflight: a run folder's jobs leave them out from then on, for a day."""

import time
from pathlib import Path

from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.base.lock import hold_folder

NAME = "nodes.json"
KEPT_SECONDS = 86_400.0  # administrators repair nodes; one that still fails is found again


def excluded_nodes(folder: Path, *, now: float | None = None) -> list[str]:
    """The nodes that failed within the last day, sorted; by a clock that was wrong, a day ahead at most."""
    now = time.time() if now is None else now
    return sorted(node for node, entry in _read(folder).items() if abs(now - entry["time"]) < KEPT_SECONDS)


def exclude_node(folder: Path, node: str, *, reason: str) -> None:
    """Leave a node out from now on."""
    with hold_folder(folder, wait_seconds=60):  # jobs of one run may find bad nodes at a time
        write_json(folder / NAME, {**_read(folder), node: {"reason": reason, "time": time.time()}})


def _read(folder: Path) -> dict[str, dict]:
    path = folder / NAME
    return read_json(path) if path.exists() else {}
