"""Removing checkpoints."""

import logging
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import verify_folder
from megatron_specialm.checkpoint.steps import saved_steps, step_folder

logger = logging.getLogger(__name__)


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
