"""Checkpoints that verify themselves.

    step_0000400/           model.safetensors  optimizer.safetensors  state.json  manifest.json (sizes and SHA-256)
    latest                  the newest folder's name, written last
    result.json             at the end of training: which step is the outcome

A step is written aside, fsynced, hashed and renamed, so a `step_N` folder is whole by construction; a reader checks the
hashes all the same. Nothing in it is a pickle.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_specialm.base.errors import ArtifactError, CheckpointError
from megatron_specialm.base.files import publish_folder, read_json, verify_folder, write_json, write_text

_STEP = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified step: canonical weights, the optimizer's tensors, and the loop's state."""

    folder: Path
    weights: dict[str, torch.Tensor]
    optimizer_state: dict[str, torch.Tensor]
    state: dict[str, Any]


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps stands."""
    return folder / f"step_{step:07d}"


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    weights: Mapping[str, torch.Tensor],
    optimizer_state: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write a step aside, publish it, and point `latest` at it."""
    final = step_folder(folder, step)
    aside = folder / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(dict(weights), aside / "model.safetensors")
    save_file(dict(optimizer_state), aside / "optimizer.safetensors")
    write_json(aside / "state.json", state)
    publish_folder(aside, final)
    write_text(folder / "latest", final.name + "\n")
    return final


def prune_checkpoints(folder: Path, *, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` steps and the best one."""
    steps = _steps(folder)
    for step in steps[:-keep]:
        if step != best:
            shutil.rmtree(step_folder(folder, step))


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest step that verifies, and for each newer one that does not, why it was passed over."""
    skipped: list[str] = []
    for step in reversed(_steps(folder)):
        try:
            return read_checkpoint(step_folder(folder, step)), skipped
        except ArtifactError as error:
            skipped.append(f"{step_folder(folder, step).name}: {error}")
    return None, skipped


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a step with all that training needs to go on.

    Raises:
        ArtifactError: a file is missing, cut short or changed.
    """
    verify_folder(folder)
    return Checkpoint(
        folder, _read_tensors(folder / "model.safetensors"), _read_tensors(folder / "optimizer.safetensors"),
        read_json(folder / "state.json"),
    )  # fmt: skip


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    """The canonical weights of a step, verified.

    Raises:
        ArtifactError: a file is missing, cut short or changed.
    """
    verify_folder(folder)
    return _read_tensors(folder / "model.safetensors")


def declare_final(folder: Path, *, step: int) -> None:
    """Name the step that is the outcome of training: the last, or with early stopping the best."""
    write_json(folder / "result.json", {"step": step, "folder": step_folder(folder, step).name})


def find_final(folder: Path) -> Path:
    """The step folder that is the outcome of a finished training task."""
    return folder / read_json(folder / "result.json")["folder"]


def _steps(folder: Path) -> list[int]:
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match.group(1)) for match in found if match)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
