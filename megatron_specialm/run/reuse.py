"""Taking artifacts over from other run folders (`reuse` of a config) instead of making them again.

A task that is missing here and complete there, for the same digest, gets a folder here. Large files that are written once are
hard links; other files, and all where the filesystem has no hard links, are copies. The folder is made under a temporary name,
compared with its hashes and renamed, so that after a kill the next run takes over again. The other folder is only read. Nothing
writes into a linked file: `begin_artifact` first copies the links of an artifact that it begins again.
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
    """Check that the config's `reuse` names run folders. The config's own root may be among them, even where it is missing.

    Raises:
        ConfigError: one is not a run folder.
    """
    for folder in pipeline.reuse:
        if not (Path(folder) / RESOLVED).is_file() and Path(folder).resolve() != Path(pipeline.root).resolve():
            raise ConfigError(
                f"reuse: {folder}: is not a run folder (it has no {RESOLVED}): name the `root` of a run, or leave it out"
            )


def reuse_summary(plan: Mapping[TaskId, PlannedTask]) -> str:
    """The number of artifacts to take over, as the end of a sentence; empty where there are none."""
    folders = [str(planned.elsewhere) for planned in plan.values() if planned.elsewhere is not None]
    return f", {len(folders)} taken over from {', '.join(dict.fromkeys(folders))}" if folders else ""


def take_over(plan: Mapping[TaskId, PlannedTask], root: Path) -> None:
    """Take over the artifacts that the plan finds elsewhere, unless another job has taken them over meanwhile.

    Raises:
        ArtifactError: the other artifact was removed or made again meanwhile, or is damaged.
        MachineError: another job has held the lock for long.
        OSError: the other artifact cannot be read, or this one cannot be written.
    """
    for planned in plan.values():
        if planned.elsewhere is not None:
            with hold_placing(root):
                if not is_complete(root, *planned.task.id, digest=planned.digest):
                    _take_over(planned, root, planned.elsewhere)


def _take_over(planned: PlannedTask, root: Path, there: Path) -> None:
    source = artifact_folder(there, *planned.task.id, planned.digest)
    try:
        marker = read_marker(source)
        if marker is None:
            raise FileNotFoundError
        with placed_artifact(root, *planned.task.id, planned.digest) as aside:
            _copy_folder(source, aside)
            # A task that is begun again loses its marker first.
            if read_marker(source) != marker or find_damage(aside, marker.files):
                raise FileNotFoundError
            # Links share damage, so the error names the original to be repaired.
            check_files(aside, marker.files, original=source)
    except FileNotFoundError:
        raise ArtifactError(
            f"{source}: was removed or redone while it was being copied: run the same command again"
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
    """Make a hard link; False where it cannot be made: to another filesystem, on one without hard links, or to a file of
    another user."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
