"""Run folders of earlier versions, which kept one artifact per task, in place: taken over, and nothing made again.

<root>/<stage>/<key>/task.json     became   <root>/artifacts/<stage>/<key>/<digits>/task.json
<root>/<stage>/done/<key>.json     became   done.json beside it
"""

import contextlib
import os
from pathlib import Path

from megatron_specialm.base.artifacts import (
    LABEL,
    Marker,
    artifact_folder,
    finish_artifact,
    incarnation,
    read_label,
    read_marker,
)
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import fsync_path, read_json, write_json
from megatron_specialm.config.schema import RESERVED


def adopt_earlier_layout(root: Path) -> None:
    """Move what stands in the places of earlier versions to those of this one; killed in between, it goes on next time. The
    caller is alone at work in the folder.

    Raises:
        ArtifactError: a label or marker is damaged.
    """
    for label in _of_stages(root, f"*/{LABEL}"):
        stage, key = label.parts[-3:-1]
        folder = label.parent
        target = artifact_folder(root, stage, key, read_label(folder)["digest"])
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder, target)
            fsync_path(target.parent)
    for path in _of_stages(root, "done/*.json"):
        stage, key = path.parts[-3], path.stem
        marker = _read(path)
        folder = artifact_folder(root, stage, key, marker.digest)
        if (folder / LABEL).exists() and read_marker(folder) is None and not _names_shards(folder):
            write_json(folder / LABEL, {"made_from": {}, **read_label(folder), "incarnation": incarnation()})
            finish_artifact(root, stage, key, marker)
        path.unlink()
        with contextlib.suppress(OSError):  # other markers are in it
            path.parent.rmdir()


def refuse_earlier_layout(root: Path) -> None:
    """Before who only looks is told that nothing is there.

    Raises:
        ArtifactError: something stands in the places of earlier versions.
    """
    if _of_stages(root, f"*/{LABEL}") or _of_stages(root, "done/*.json"):
        raise ArtifactError(
            f"{root}: an earlier version made it: the next `specialm run` or `submit` of its page takes it over"
        )


def _of_stages(root: Path, pattern: str) -> list[Path]:
    """Files in folders of stages, none of them behind a link of today's layout."""
    folders = [folder for folder in root.glob("*") if folder.name not in RESERVED]
    return sorted(path for folder in folders for path in folder.glob(pattern) if not path.parent.is_symlink())


def _names_shards(folder: Path) -> bool:
    """Whether it is a set gathered from shards, which it names by where they stood: gathering them again takes seconds."""
    lists = (folder / name for name in ("store.json", "vectors.json"))
    return any(path.is_file() and '"../' in path.read_text(encoding="utf-8") for path in lists)


def _read(path: Path) -> Marker:
    return read_json(path, Marker, remedy="remove it and run again")
