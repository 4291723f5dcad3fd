"""The folders of a training's steps.

step_0000400/    model-RANK.safetensors  optimizer-RANK.safetensors  state.json  manifest.json
result.json      at the end of training: which step is the outcome

`state.json` has the training's `progress` (step, tokens, best validation loss, gradient norms), the cost up to there (`spent`),
and what describes the model: shape, tokenizer, learning rate, seeds, layout, parity certificate, versions. `_Loop._save`
(`train/loop.py`) puts it together, with `_description` (`stages/train.py`); `save_checkpoint` (`saving.py`) writes the file.
"""

import logging
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_specialm.base.artifacts import MARKER, RESULT, check_fence
from megatron_specialm.base.artifacts import STATE as STATE
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json, verify_folder, write_json

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True)
class SavedProgress:
    """What is read here of a training's progress in a step's state."""

    step: int
    best_step: int | None = None


@dataclass(frozen=True)
class State:
    """What is read here of a step's state. `progress` is None where no training can go on from the step."""

    progress: SavedProgress | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class _Result:
    step: int
    folder: str


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return folder / f"step_{step:07d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a training's folder, in order, verified or not."""
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match.group(1)) for match in found if match)


def declare_final(folder: Path, *, step: int) -> None:
    """Write which step is the outcome of training: the last, or with early stopping the best.

    Raises:
        ArtifactError: the step is damaged or gone, or another process has taken over this training.
    """
    verify_folder(step_folder(folder, step))
    check_fence(folder)
    write_json(folder / RESULT, asdict(_Result(step, step_folder(folder, step).name)))


def find_final(folder: Path) -> Path:
    """The step folder that is the outcome of a finished training.

    Raises:
        ArtifactError: there is none, or it is no step of this training.
    """
    remedy = f"remove {folder / MARKER} and run again, which goes on from the checkpoints"
    result = read_json(folder / RESULT, _Result, remedy=remedy)
    final = step_folder(folder, result.step)
    if final.name != result.folder or not _STEP.fullmatch(final.name) or not final.is_dir():
        raise ArtifactError(
            f"{folder / RESULT}: names {result.folder!r} for step {result.step}, which is no step of this training: {remedy}"
        )
    return final


def prune_checkpoints(folder: Path, *, step: int, keep: int, beside: Collection[int | None]) -> None:
    """Remove the steps up to `step`, which was just saved, except the newest `keep` of them and those in `beside`. Later steps
    stay and do not count: training passed over them as damaged, and writes them again when it comes there."""
    up_to_here = [saved for saved in saved_steps(folder) if saved <= step]
    for saved in up_to_here[:-keep]:
        if saved not in beside:
            shutil.rmtree(step_folder(folder, saved))


def remove_unusable(folder: Path, steps: Iterable[int], *, last: int) -> None:
    """At the end of a training, remove those of `steps` that do not verify or are behind the `last` one: a finished artifact
    has no damaged step."""
    for step in steps:
        path = step_folder(folder, step)
        try:
            if step <= last and path.exists():
                verify_folder(path)
                continue
            why = f"training has ended at step {last}"
        except ArtifactError as error:
            why = str(error)
        if path.exists():
            logger.warning("removed %s: %s", path, why)
            shutil.rmtree(path)
