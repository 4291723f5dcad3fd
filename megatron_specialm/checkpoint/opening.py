"""Verifying and reading a checkpoint, which any layout can do: each process reads the slices that it holds."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError, CheckpointError
from megatron_specialm.base.files import MANIFEST, listed_files, read_json, unlisted_files, verify_folder
from megatron_specialm.checkpoint.steps import STATE, State, saved_steps, step_folder
from megatron_specialm.checkpoint.tensor_files import TensorFiles

REMEDY = "remove the step's folder and run the same command again, which goes on from the step before"
_PARTS = {part: re.compile(rf"{part}-\d{{5}}\.safetensors") for part in ("model", "optimizer")}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A step: canonical weights, the optimizer's tensors, and the state of the training loop."""

    folder: Path
    weights: TensorFiles
    optimizer_state: TensorFiles
    state: dict[str, Any]


def open_checkpoint(folder: Path, *, remedy: str = REMEDY) -> Checkpoint:
    """Open a verified step. Only files that its manifest lists are read.

    Args:
        remedy: what to do if it is damaged.

    Raises:
        ArtifactError: the manifest lists no weights or no state, the state is of another step, or slices of a tensor are
            missing or overlap.
    """
    listed = listed_files(folder, remedy=remedy)
    files = {part: [folder / name for name in sorted(listed) if own.fullmatch(name)] for part, own in _PARTS.items()}
    if STATE not in listed or not files["model"]:
        raise CheckpointError(f"{folder / MANIFEST}: lists no {'weights' if STATE in listed else STATE}: {remedy}")
    progress = read_json(folder / STATE, State, remedy=remedy).progress
    if progress is not None and step_folder(folder.parent, progress.step).name != folder.name:
        raise CheckpointError(f"{folder / STATE}: is of step {progress.step}: {remedy}")
    weights, optimizer_state = (TensorFiles(files[part], remedy=remedy) for part in _PARTS)
    return Checkpoint(folder, weights, optimizer_state, read_json(folder / STATE, dict[str, Any], remedy=remedy))


def read_checkpoint(folder: Path, *, remedy: str = REMEDY) -> Checkpoint:
    """Verify a step and open it; `remedy` says what to do if it is damaged.

    Raises:
        ArtifactError: a file is missing, cut short or changed; or see `open_checkpoint`.
    """
    verify_folder(folder, remedy=remedy)
    for path in unlisted_files(folder):
        logger.warning("%s: is not read: %s does not list it", path, MANIFEST)
    return open_checkpoint(folder, remedy=remedy)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest step that training can go on from, and why each newer one was passed over: it does not verify, or the best
    step so far does not, which would be the outcome if no later step were better."""
    skipped: list[str] = []
    for step in reversed(saved_steps(folder)):
        try:
            found = read_checkpoint(step_folder(folder, step)).folder
            progress = read_json(found / STATE, State).progress
            if progress is not None and progress.best_step not in (None, step):
                read_checkpoint(step_folder(folder, progress.best_step))
            return found, skipped
        except ArtifactError as error:
            skipped.append(f"{step_folder(folder, step).name}: {error}")
    return None, skipped
