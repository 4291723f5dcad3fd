"""The nodes of a job: checked before ranks start on them, and excluded from a run folder's jobs for a day where they fail.

Each node runs `node_check.py`; here the results are judged, also against those of the other nodes.
"""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError, MachineError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.base.lock import hold_folder
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.config.site import Preflight

EXCLUDED = "nodes.json"
EXCLUDED_SECONDS = 86_400.0  # administrators repair nodes; one that still fails is excluded again
PROBE_SECONDS = 30.0
PROBES_AT_ONCE = 32
Result = Mapping[str, Any]


@dataclass(frozen=True)
class _Excluded:
    """Why a node is excluded, and since when, in Unix time."""

    reason: str
    time: float


def excluded_nodes(folder: Path, *, now: float | None = None) -> list[str]:
    """The nodes that were excluded within the last day, sorted. A clock that was wrong excludes for a day at most, too."""
    return sorted(_newest_first(folder, time.time() if now is None else now))


def nodes_to_exclude(folder: Path, could_start: Callable[[Sequence[str]], bool]) -> list[str]:
    """The excluded nodes, newest first, without those excluded longest ago where a job could never start otherwise.

    Args:
        could_start: whether the job could without such nodes.
    """
    nodes = _newest_first(folder, time.time())
    while nodes and not could_start(nodes):
        nodes.pop()
    return nodes


def _newest_first(folder: Path, now: float) -> list[str]:
    nodes = {node: entry for node, entry in _read_excluded(folder).items() if abs(now - entry.time) < EXCLUDED_SECONDS}
    return sorted(nodes, key=lambda node: nodes[node].time, reverse=True)


def exclude_node(folder: Path, node: str, *, reason: str) -> None:
    """Exclude a node from now on."""
    with hold_folder(folder, wait_seconds=60):  # several jobs of a run may exclude nodes at a time
        nodes = {**_read_excluded(folder), node: _Excluded(reason, time.time())}
        write_json(folder / EXCLUDED, {name: asdict(entry) for name, entry in nodes.items()})


def _read_excluded(folder: Path) -> dict[str, _Excluded]:
    path = folder / EXCLUDED
    return read_json(path, dict[str, _Excluded], remedy="repair or remove it") if path.exists() else {}


@dataclass(frozen=True)
class _Result:
    """The content of a node's result: see `node_check.py`. The fields without a default are always there."""

    began: float
    gpus: int
    products: dict[str, float | None]
    alone: float | None = None
    ended: float | None = None
    bytes_per_second: float | None = None
    error: str | None = None
    joint_error: str | None = None


def check_nodes(
    command: Sequence[str], folder: Path, *, nodes: Sequence[str], gpus: int, settings: Preflight
) -> dict[str, str]:
    """Run the check; the nodes that fail it, each with the reason.

    Args:
        command: starts `node_check` once on each node.
        folder: a new one, for the nodes' results.
        gpus: how many each node must have.

    Raises:
        MachineError: no node is the cause: the disk of the run folder is full, or nothing can be started.
    """
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < settings.free_disk:
        raise MachineError(
            f"{folder}: {free / 2**20:,.0f} MiB free, and {settings.free_disk / 2**20:,.0f} MiB are wanted "
            "(preflight.free_disk of the site profile): free space, and submit again"
        )
    began, watch = time.time(), Stopwatch()
    try:
        outcome = subprocess.run(command, timeout=settings.seconds, capture_output=True, text=True)
        message = " ".join(outcome.stderr.split())[-300:]
    except subprocess.TimeoutExpired:
        message = f"no answer within {settings.seconds:g} s"
    results = {node: result for node in nodes if (result := _read_result(folder / f"{node}.json")) is not None}
    if not results:
        raise MachineError(f"preflight: no node answers: {message}")
    if bad := judge(results, nodes=nodes, gpus=gpus, settings=settings, between=(began, began + watch.seconds)):
        return bad
    waiting = {node: "it waits for the others" for node, result in results.items() if "ended" not in result}
    errors = {node: result["joint_error"] for node, result in results.items() if "joint_error" in result}
    if joint := [f"{node}: {error}" for node, error in {**waiting, **errors}.items()]:
        raise MachineError(f"preflight: the nodes cannot compute together: {'; '.join(joint)}")
    return {}


def unreachable_nodes(nodes: Sequence[str], command: Callable[[str], Sequence[str]]) -> dict[str, str]:
    """The nodes on which no process can be started from this one, each with the reason. None if that holds for all: then no
    node is the cause. Slurm may know nothing of it: its controller may reach nodes that do not reach each other.

    Args:
        command: starts a process on a node.
    """
    with ThreadPoolExecutor(PROBES_AT_ONCE) as pool:
        faults = dict(zip(nodes, pool.map(lambda node: _probe(command(node)), nodes), strict=True))
    bad = {node: fault for node, fault in faults.items() if fault is not None}
    return bad if len(bad) < len(nodes) else {}


def _probe(command: Sequence[str]) -> str | None:
    try:
        outcome = subprocess.run(
            command, timeout=PROBE_SECONDS, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return f"no process starts on it within {PROBE_SECONDS:g} s"
    return f"no process starts on it: {' '.join(outcome.stderr.split())[-300:]}" if outcome.returncode else None


def judge(
    results: Mapping[str, Result], *, nodes: Sequence[str], gpus: int, settings: Preflight, between: tuple[float, float]
) -> dict[str, str]:  # fmt: skip
    """The nodes that fail, each with the reason: by their own results, or because they are slower than the others.

    Args:
        between: Unix times by the first node's clock, before and after the check.
    """
    bad = {node: reason for node in nodes if (reason := _fault(results.get(node), gpus, settings, between))}
    products = {node: result["products"].values() for node, result in results.items() if node not in bad}
    fit = {node: min(speeds) for node, speeds in products.items() if speeds}
    for node, speed in fit.items():
        usual = statistics.median([other for name, other in fit.items() if name != node] or [speed])
        if speed * settings.slower_than < usual:
            bad[node] = f"its matrix products are {usual / speed:.1f} times slower than the others'"
    return bad


def _fault(result: Result | None, gpus: int, settings: Preflight, between: tuple[float, float]) -> str | None:
    """Why a node's own result fails it."""
    if result is None:
        return "it does not answer"
    if "alone" not in result:
        return "its computations do not end"
    if result["gpus"] < gpus:
        return f"it shows {result['gpus']} GPUs of {gpus}"
    if wrong := [device for device, speed in result["products"].items() if speed is None]:
        return f"matrix products on {', '.join(wrong)} are wrong"
    if result.get("bytes_per_second", 0) is None:
        return "an all-reduce with the others gives a wrong sum"
    early = between[0] - result["began"]
    late = result["began"] + result.get("ended", result["alone"]) - between[1]
    if max(early, late) > settings.clock_seconds:
        return f"its clock differs by {max(early, late):.0f} s or more from the first node's"
    return result.get("error")


def _read_result(path: Path) -> Result | None:
    try:
        read_json(path, _Result)
        return read_json(path)
    except ArtifactError:
        return None
