"""Taking over the checkpoints of another training: of the trial of a learning rate, or of a shorter or longer training."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_specialm.base.artifacts import check_fence
from megatron_specialm.base.errors import ArtifactError, CheckpointError
from megatron_specialm.base.files import fsync_path, link_folder, read_json
from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.saving import make_temporary
from megatron_specialm.checkpoint.steps import STATE, State, saved_steps, step_folder


def adopt_checkpoints(source: Path, folder: Path) -> None:
    """Give a training all steps of its trial, to go on from. Nothing is done where it has the newest of them or a later step:
    the newest is copied last, so all are there.

    Raises:
        ArtifactError: a step is damaged, or there is none, or the training has steps of another learning rate, or another
            process has taken it over.
    """
    steps = saved_steps(source)
    if not steps:
        raise ArtifactError(f"{source}: no checkpoints found; remove that folder to repeat the training")
    _refuse_steps_of_other_rates(folder, like=step_folder(source, steps[-1]))
    own = saved_steps(folder)
    if own and own[-1] >= steps[-1]:
        return
    try:
        for step in steps:
            read_checkpoint(step_folder(source, step))
    except ArtifactError as error:
        raise ArtifactError(f"{error}; remove {source} to have that training done again") from None
    adopt_steps(source, folder, steps)


def adopt_steps(source: Path, folder: Path, steps: Sequence[int]) -> None:
    """Give a training some verified steps of another one, in this order: by hard links where the filesystem can.

    Raises:
        ArtifactError: another process has taken over this training.
    """
    for step in steps:
        final = step_folder(folder, step)
        aside = make_temporary(final)
        link_folder(step_folder(source, step), aside)
        check_fence(folder)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        fsync_path(folder)


def _refuse_steps_of_other_rates(folder: Path, *, like: Path) -> None:
    """A trial that was done again may have changed which rate is best. Steps of the training at another rate are not removed:
    the user decides."""
    rate = _rate_of(like)
    for step in (step_folder(folder, saved) for saved in saved_steps(folder)):
        if rate is not None and (other := _rate_of(step)) not in (None, rate):
            raise CheckpointError(
                f"{step}: was trained at learning rate {other!r}, and the trials choose {rate!r} now, as one was done again: "
                f"move the step_* folders of {folder} away and run again, which trains at {rate!r}, or put the trials of "
                "before back from a copy"
            )


def _rate_of(step: Path) -> float | None:
    """None where the state does not say, or is damaged: such a step is passed over anyway."""
    try:
        return read_json(step / STATE, State).learning_rate
    except ArtifactError:
        return None
