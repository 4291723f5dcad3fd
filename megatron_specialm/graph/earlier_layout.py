"""Run folders of earlier versions, which had one artifact per task, without its digest in the path. They are converted; nothing
is made again.

<root>/<stage>/<key>/task.json     became   <root>/artifacts/<stage>/<key>/<digits>/task.json
<root>/<stage>/done/<key>.json     became   done.json beside it
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_specialm.base.artifacts import (
    LABEL,
    Marker,
    artifact_folder,
    artifact_link,
    fencing_token,
    finish_artifact,
    read_label,
    read_marker,
)
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import fsync_path, read_json, write_json
from megatron_specialm.base.lock import hold_placing

NO_STAGES = ("artifacts", "figures", "jobs", "parity")  # folders of a run folder that are not of a stage


def has_earlier_layout(root: Path) -> bool:
    """Whether a run folder has artifacts of an earlier version."""
    return any((*_labels(root), *_markers(root)))


def refuse_earlier_layout(root: Path) -> None:
    """For commands that only read: without this they would report that nothing is there.

    Raises:
        ArtifactError: the folder has artifacts of an earlier version.
    """
    if has_earlier_layout(root):
        raise ArtifactError(
            f"{root}: an earlier version made it: the next `specialm run` or `submit` of its config takes it over"
        )


def adopt_earlier_layout(root: Path) -> None:
    """Move artifacts of an earlier version to their new places. If this is killed, the next call continues. The caller has
    checked that no job of an earlier version works in the folder; it waits for another process that does the same.

    Raises:
        ArtifactError: a label or marker is damaged; or a job of an earlier version has begun again what was moved.
        MachineError: another process has held the lock for long.
    """
    with hold_placing(root):
        for label in sorted(_labels(root)):
            stage, key = label.parts[-3:-1]
            target = artifact_folder(root, stage, key, read_label(label.parent)["digest"])
            _refuse_two(label.parent, target)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(label.parent, target)
            fsync_path(target.parent)
        for path in sorted(_markers(root)):
            _move_marker(root, path)


def _labels(root: Path) -> Iterator[Path]:
    """The labels of an earlier version's artifacts: this version has links in their places."""
    return (
        path for path in root.glob(f"*/*/{LABEL}") if path.parts[-3] not in NO_STAGES and not path.parent.is_symlink()
    )


def _markers(root: Path) -> Iterator[Path]:
    """The markers of an earlier version. A domain may be named `done` too: its folder is an artifact, or a link to one."""
    return (
        path
        for path in root.glob("*/done/*.json")
        if path.parts[-3] not in NO_STAGES and not path.parent.is_symlink() and not (path.parent / LABEL).exists()
    )


def _move_marker(root: Path, path: Path) -> None:
    stage, key = path.parts[-3], path.stem
    marker = read_json(path, Marker, remedy="remove it and run again")
    folder = artifact_folder(root, stage, key, marker.digest)
    if (folder / LABEL).exists() and read_marker(folder) is None and not _names_shards(folder):
        _refuse_two(artifact_link(root, stage, key), folder)
        write_json(folder / LABEL, {"made_from": {}, **read_label(folder), "incarnation": fencing_token()})
        finish_artifact(root, stage, key, marker)
    path.unlink()
    with contextlib.suppress(OSError):  # it has other markers
        path.parent.rmdir()


def _refuse_two(place: Path, moved: Path) -> None:
    """Refuse an artifact that a job of an earlier version, which does not know the new places, has made again after it was
    moved."""
    if moved.exists() and place.exists() and not place.is_symlink():
        raise ArtifactError(
            f"{place}: a job of an earlier version has made it again after it was moved to {moved}: let that job end, or "
            "cancel it, and move one of the two folders away"
        )


def _names_shards(folder: Path) -> bool:
    """Whether it is a set gathered from shards, which it names by their earlier paths: to gather them again takes seconds."""
    lists = (folder / name for name in ("store.json", "vectors.json"))
    return any(path.is_file() and '"../' in path.read_text(encoding="utf-8") for path in lists)
