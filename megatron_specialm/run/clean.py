"""Artifacts in a run folder that its config does not use, and their removal on demand."""

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.artifacts import (
    ARTIFACTS,
    LABEL,
    MARKER,
    SHOWN_DIGITS,
    artifact_link,
    read_label,
    read_marker,
)
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.lock import hold_task
from megatron_specialm.base.terminal import Table
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.tasks import TaskId


@dataclass(frozen=True)
class Unwanted:
    """An artifact that the config does not use.

    bytes: that its removal frees, without files that another run folder shares.
    age: seconds since it was finished, or begun.
    device_seconds: its cost, with that of the work that it continued; None where it was not finished.
    """

    task: TaskId
    folder: Path
    bytes: int
    age: float
    device_seconds: float | None


def find_unwanted(plan: Mapping[TaskId, PlannedTask], root: Path, *, live: Collection[str]) -> list[Unwanted]:
    """Artifacts of other settings, text or inputs, and of tasks that are not in the config; the largest first.

    Args:
        live: digests of what live jobs make and read; these and their inputs are kept.
    """
    wanted = {*_with_inputs(root, live), *(planned.digest for planned in plan.values())}
    names = {digest[:SHOWN_DIGITS] for digest in wanted}
    found = [_describe(folder) for folder in _all_artifacts(root) if folder.name not in names]
    return sorted(found, key=lambda unwanted: -unwanted.bytes)


def _all_artifacts(root: Path) -> Iterator[Path]:
    """The folders of all artifacts in a run folder, finished or not, of any settings."""
    return (path.parent for path in sorted((root / ARTIFACTS).glob(f"*/*/*/{LABEL}")))


def _with_inputs(root: Path, digests: Iterable[str]) -> set[str]:
    folders = {folder.name: folder for folder in _all_artifacts(root)}
    found: set[str] = set()
    left = list(digests)
    while left:
        if (digest := left.pop()) not in found:
            found.add(digest)
            if (folder := folders.get(digest[:SHOWN_DIGITS])) is not None:
                left += read_label(folder)["made_from"].get("inputs", {}).values()
    return found


def _describe(folder: Path) -> Unwanted:
    stats = (path.lstat() for path in folder.rglob("*") if not path.is_dir())
    freed, age, cost = sum(status.st_size for status in stats if status.st_nlink == 1), 0.0, None
    with contextlib.suppress(ArtifactError):  # of a damaged marker: without the cost
        marker = read_marker(folder)
        cost = marker.whole_cost.device_seconds if marker else None
        age = max(0.0, time.time() - (folder / (MARKER if marker else LABEL)).stat().st_mtime)
    return Unwanted(TaskId(*folder.parts[-3:-1]), folder, freed, age, cost)


def unwanted_table(unwanted: Iterable[Unwanted]) -> Table:
    """A line per artifact."""
    lines = [
        [
            str(one.task), one.folder.name, "finished" if one.device_seconds is not None else "unfinished",
            f"{one.bytes / 2**20:,.1f}", f"{one.age / 86400:.1f}",
            "" if one.device_seconds is None else f"{one.device_seconds / 3600:,.3f}",
        ]
        for one in unwanted
    ]  # fmt: skip
    return Table("", ["task", "digest", "state", "MiB", "days old", "device-hours"], lines, 3)


def remove(unwanted: Iterable[Unwanted], root: Path) -> None:
    """Remove artifacts and the links to them. Each is renamed first, so that a kill leaves no partial artifact. The caller
    holds the run folder.

    Raises:
        ArtifactError: the label of one is of another digest.
    """
    for one in unwanted:
        if not read_label(one.folder)["digest"].startswith(one.folder.name):
            raise ArtifactError(
                f"{one.folder / LABEL}: is of another digest: the file is damaged; remove the folder by hand"
            )
        aside = one.folder.with_name(f".{one.folder.name}.tmp")
        with hold_task(root, *one.task):  # a job that this machine cannot ask about may be running
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(one.folder, aside)
            shutil.rmtree(aside)
        place = artifact_link(root, *one.task)
        if place.is_symlink() and not place.exists():
            place.unlink()
        for folder in (aside.parent, aside.parent.parent, place.parent):
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()
    for aside in (root / ARTIFACTS).glob("*/*/.*.tmp"):  # of a removal or a take-over that was killed
        shutil.rmtree(aside)
