"""Writing a checkpoint, which is the folder of a step.

Each process writes the slices that it owns (`slices.py`) to files of its own, fsyncs and hashes them. The first process then
adds the state and a manifest with the size and SHA-256 of every file, and renames the folder to its final name. So a
`step_N` folder is complete. No file is a pickle.
"""

import secrets
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from megatron_specialm.base.artifacts import check_fence
from megatron_specialm.base.background import in_background
from megatron_specialm.base.control_group import ControlGroup
from megatron_specialm.base.files import ManifestEntry, publish_folder, seal_file, write_json
from megatron_specialm.base.tensors import save_tensors
from megatron_specialm.checkpoint.slices import SavedTensors
from megatron_specialm.checkpoint.steps import STATE, prune_checkpoints, step_folder


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    weights: Mapping[str, torch.Tensor],
    optimizer_state: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    control: ControlGroup = ControlGroup(),  # noqa: B008 (this process alone)
) -> Path:
    """Write a step and publish it; returns its folder when it is durable. All processes call this, each with the tensors or
    slices that it writes, by their keys.

    Raises:
        OSError: a file cannot be written, on any process; all of them raise it. The step is not published.
        ArtifactError: another process has taken over this training.
    """
    final = step_folder(folder, step)

    def write() -> dict[str, ManifestEntry]:
        entries = {}
        for part, tensors in (("model", weights), ("optimizer", optimizer_state)):
            path = aside / f"{part}-{control.rank:05d}.safetensors"
            if tensors:
                save_tensors(tensors, path)
                entries[path.name] = seal_file(path)
        return entries

    def publish() -> None:
        check_fence(folder)
        write_json(aside / STATE, state)
        publish_folder(aside, final, sealed={name: entry for own in written for name, entry in own.items()})

    aside = control.broadcast(lambda: make_temporary(final))
    written = control.agree(write)
    control.broadcast(publish)
    return final


def make_temporary(final: Path) -> Path:
    """A new folder beside a step's final one, under a name of its own; those that killed attempts have left are removed.

    Raises:
        ArtifactError: another process has taken over this training.
    """
    folder = final.parent
    check_fence(folder)
    for abandoned in folder.glob(".step_*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    aside = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"
    aside.mkdir(parents=True)
    return aside


class Saver:
    """Saves steps in a thread while training goes on."""

    def __init__(self, folder: Path, control: ControlGroup) -> None:
        self._folder, self._control = folder, control
        self._pending: Future[None] | None = None

    def save(
        self,
        tensors: Future[SavedTensors],
        *,
        step: int,
        state: Mapping[str, Any],
        keep: int,
        beside: Collection[int | None],
    ) -> None:
        """Wait for the save before, then begin `save_checkpoint` and `prune_checkpoints`.

        Args:
            tensors: those that this process writes; they may still be copied.

        Raises:
            OSError: the step before could not be written. Its copy's error, too, is raised here or by `wait`.
        """
        self.wait()

        def work() -> None:
            weights, optimizer_state = tensors.result()
            save_checkpoint(
                self._folder,
                step=step,
                weights=weights,
                optimizer_state=optimizer_state,
                state=state,
                control=self._control,
            )
            # All wait for it: else rank 0 alone comes late to the next step, where the others' collectives time out.
            self._control.broadcast(lambda: prune_checkpoints(self._folder, step=step, keep=keep, beside=beside))

        self._pending = in_background(work, name="save")

    def wait(self) -> None:
        """Return when the last step is durable.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
