"""Artifacts: one folder per task, complete when its marker is there.

    <root>/<stage>/<key>/            what the task made; task.json names the digest it is being made for, and by whom
    <root>/<stage>/done/<key>.json   the marker, written last: digest, report, cost, versions

A reader asks for an artifact by its digest, so work that is stale (made from other settings, text or inputs) is never
taken for what is wanted, and equal work is never done twice.

A node that Slurm has given up may only be cut off, and its ranks still at work when their job runs again elsewhere. So each
incarnation of a task writes its name when it begins, and looks whether it still stands there before it publishes anything.
"""

import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import MANIFEST, atomic_path, fsync_path, read_json, write_json

LABEL = "task.json"


@dataclass(frozen=True)
class Cost:
    """What a task cost; docs/methods.md has the rule.

    tokens: trained on (or read, for other stages), real ones.
    slots: token positions of the windows that these came in, padding included; 0 where nothing was read in windows.
    flops: of the model's or algorithm's own arithmetic, of every pass really made.
    wall_seconds: from the task's beginning to its end, over all attempts of a training.
    device_seconds: wall seconds times processes, a process on CPU counting as one device.
    """

    tokens: int
    flops: int
    wall_seconds: float
    device_seconds: float
    device: str
    processes: int
    slots: int = 0  # markers of earlier versions lack it

    def plus(self, other: "Cost") -> "Cost":
        """Both together: the devices of both, and the most processes."""
        devices = dict.fromkeys((*self.device.split(", "), *other.device.split(", ")))
        return Cost(
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.wall_seconds + other.wall_seconds,
            self.device_seconds + other.device_seconds,
            ", ".join(devices),
            max(self.processes, other.processes),
            self.slots + other.slots,
        )


@dataclass(frozen=True)
class Spent:
    """A part of a task's cost."""

    tokens: int = 0
    slots: int = 0
    flops: int = 0
    seconds: float = 0.0  # wall seconds

    def plus(self, other: "Spent") -> "Spent":
        """Both together."""
        return Spent(
            self.tokens + other.tokens,
            self.slots + other.slots,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Report:
    """What a stage function returns: its cost's parts that only it knows, and values worth telling.

    lost_seconds: of attempts before this one, where the stage goes on from them.
    apart: what was spent on work that decides nothing of the result: it is on record, and no part of the task's cost. Its
        seconds are within those of all attempts.
    earlier: what another artifact had cost that this one goes on from: on record beside the task's own cost.
    """

    tokens: int = 0
    flops: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    slots: int = 0
    lost_seconds: float = 0.0
    apart: Spent = Spent()
    earlier: Cost | None = None


@dataclass(frozen=True)
class Marker:
    """The content of a completion marker. `apart` is the cost of work that decides nothing of the result, `earlier` that of
    another artifact, up to where this one goes on from it."""

    digest: str
    cost: Cost
    values: dict[str, Any]
    versions: dict[str, str]
    apart: Cost | None = None
    earlier: Cost | None = None

    @property
    def whole_cost(self) -> Cost:
        """All that the result cost, work in other tasks left out."""
        return self.cost.plus(self.earlier) if self.earlier else self.cost


def artifact_folder(root: Path, stage: str, key: str) -> Path:
    """Where a task's files stand."""
    return root / stage / key


def aside_folder(root: Path, stage: str, key: str) -> Path:
    """Where a whole artifact is put together that comes from elsewhere; no key begins with a dot."""
    return root / stage / f".{key}.tmp"


def marker_path(root: Path, stage: str, key: str) -> Path:
    """Where a task's completion marker stands."""
    return root / stage / "done" / f"{key}.json"


def begin_artifact(root: Path, stage: str, key: str, *, digest: str) -> Path:
    """The folder to write into. What was made for another digest is removed; an unfinished same one is kept to resume, with no
    file in it that another run folder shares."""
    folder = artifact_folder(root, stage, key)
    shutil.rmtree(aside_folder(root, stage, key), ignore_errors=True)
    marker_path(root, stage, key).unlink(missing_ok=True)
    label = folder / LABEL
    if folder.exists() and (not label.exists() or read_json(label)["digest"] != digest):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _unshare(folder)
    _write_label(folder, digest)
    return folder


def place_artifact(root: Path, stage: str, key: str, marker: Marker) -> None:
    """Give the finished folder that stands aside the artifact's place, and declare it complete. Killed before the marker is
    there, it is an attempt that is resumed."""
    aside, final = aside_folder(root, stage, key), artifact_folder(root, stage, key)
    _write_label(aside, marker.digest)
    marker_path(root, stage, key).unlink(missing_ok=True)
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    fsync_path(final.parent)
    finish_artifact(root, stage, key, marker)


def _write_label(folder: Path, digest: str) -> None:
    write_json(folder / LABEL, {"digest": digest, "incarnation": incarnation()})


def _unshare(folder: Path) -> None:
    """Make the folder's own what may be written to: run folders that reuse each other's artifacts share large files by hard
    links. Published folders stay as they are, as nobody writes into them."""
    published = {path.parent for path in folder.rglob(MANIFEST)}
    for path in folder.rglob("*"):
        if not published.isdisjoint(path.parents):
            continue
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
            with atomic_path(path) as own:
                shutil.copyfile(path, own)


def incarnation(environ: Mapping[str, str] = os.environ) -> str:
    """This process's name among all that may work at a task: its job and attempt, or its number and machine."""
    return environ.get("SPECIALM_INCARNATION") or f"{os.getpid()}@{socket.gethostname()}"


def refuse_if_taken_over(folder: Path) -> None:
    """Before anything is published in an artifact's folder. A folder without a label is no task's.

    Raises:
        ArtifactError: another incarnation has begun the task since.
    """
    label = folder / LABEL
    if label.exists() and (now := read_json(label).get("incarnation")) != incarnation():
        raise ArtifactError(
            f"{folder}: another incarnation of this task, {now}, has taken over from {incarnation()}, which publishes "
            "nothing more: leave the folder to it"
        )


def finish_artifact(root: Path, stage: str, key: str, marker: Marker) -> None:
    """Declare an artifact complete.

    Raises:
        ArtifactError: another incarnation has taken over.
    """
    refuse_if_taken_over(artifact_folder(root, stage, key))
    write_json(marker_path(root, stage, key), asdict(marker))


def read_marker(root: Path, stage: str, key: str) -> Marker | None:
    """The completion marker, or None where the task has not finished."""
    path = marker_path(root, stage, key)
    if not path.exists():
        return None
    try:
        value = read_json(path)
        apart, earlier = (Cost(**value[part]) if value.get(part) else None for part in ("apart", "earlier"))
        return Marker(value["digest"], Cost(**value["cost"]), value["values"], value["versions"], apart, earlier)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a completion marker ({error!r}): remove it and run again") from None


def is_complete(root: Path, stage: str, key: str, *, digest: str) -> bool:
    """Whether the artifact is there, finished, and made for this digest."""
    marker = read_marker(root, stage, key)
    return marker is not None and marker.digest == digest and artifact_folder(root, stage, key).is_dir()
