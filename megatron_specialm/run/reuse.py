"""What other run folders have (`reuse` of a config), taken over instead of made again.

A task that is missing here and complete there, for the same digest, gets a folder of its own here. Large files that are
written once are hard links to those there; all others, and where the filesystem has no such links, are copies. The folder is
made aside, compared with its hashes and renamed: a kill at any time leaves what the next run takes over again. The other
folder is only read. Nothing ever writes into a linked file: `begin_artifact` makes what it begins again its own first.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_specialm.base.artifacts import artifact_folder, is_complete, placed_artifact, read_marker
from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.base.files import fsync_path
from megatron_specialm.base.integrity import check_files, find_damage
from megatron_specialm.base.lock import hold_placing
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.plan import RESOLVED, PlannedTask
from megatron_specialm.graph.tasks import TaskId

# Weights, tokens, vectors, a teacher's cache. What trainings write in place (metrics.jsonl, work.json) is small, and copied.
LINKED = (".safetensors", ".bin", ".idx", ".npy", ".npz")


def refuse_other_folders(pipeline: Pipeline) -> None:
    """Before anything runs: that the config's `reuse` names run folders. Its own may be among them, and be missing.

    Raises:
        ConfigError: one is none.
    """
    for folder in pipeline.reuse:
        if not (Path(folder) / RESOLVED).is_file() and Path(folder).resolve() != Path(pipeline.root).resolve():
            raise ConfigError(
                f"reuse: {folder}: is not a run folder (it has no {RESOLVED}): name the `root` of a run, or leave it out"
            )


def told(plan: Mapping[TaskId, PlannedTask]) -> str:
    """What will be taken over, as the end of a sentence; empty where there is nothing."""
    folders = [str(planned.there) for planned in plan.values() if planned.there is not None]
    return f", {len(folders)} taken over from {', '.join(dict.fromkeys(folders))}" if folders else ""


def take_over(plan: Mapping[TaskId, PlannedTask], root: Path) -> None:
    """Take over what the plan finds elsewhere, and another job that shares the folder has not taken over since.

    Raises:
        ArtifactError: an artifact was removed or made anew there meanwhile, or is damaged there.
        MachineError: another job has been at it for long.
        OSError: it cannot be read there or written here.
    """
    for planned in plan.values():
        if planned.there is not None:
            with hold_placing(root):
                if not is_complete(root, *planned.task.id, digest=planned.digest):
                    _take_over(planned, root, planned.there)


def _take_over(planned: PlannedTask, root: Path, there: Path) -> None:
    source = artifact_folder(there, *planned.task.id, planned.digest)
    try:
        marker = read_marker(source)
        if marker is None:
            raise FileNotFoundError
        with placed_artifact(root, *planned.task.id, planned.digest) as aside:
            _copy_folder(source, aside)
            # The marker goes first when a task is begun again.
            if read_marker(source) != marker or find_damage(aside, marker.files):
                raise FileNotFoundError
            # Links share damage: were only the marker here removed, the same bytes would come back.
            check_files(aside, marker.files, original=source)
    except FileNotFoundError:
        raise ArtifactError(
            f"{source}: was removed or made anew while it was taken over: run the same command again"
        ) from None


def _copy_folder(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        own = target / entry.name
        if entry.is_symlink():
            own.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            _copy_folder(entry, own)
        elif not (entry.name.endswith(LINKED) and _linked(entry, own)):
            shutil.copyfile(entry, own)
            fsync_path(own)
    fsync_path(target)


def _linked(source: Path, target: Path) -> bool:
    """Whether a hard link could be made: not on another filesystem, on one without them, or to somebody else's file."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
