"""Checkpoints that verify themselves and fit any layout.

    step_0000400/           model-RANK.safetensors  optimizer-RANK.safetensors  state.json
                            manifest.json (sizes and SHA-256)
    result.json             at the end of training: which step is the outcome

Tensors are whole and canonical (`model/weights.py`); each process writes those that fall to it, so what a file holds is
of no consequence to a reader. A step is written aside, fsynced, hashed and renamed: a `step_N` folder is whole by
construction; a reader checks the hashes all the same, and opens what the manifest lists and nothing else. Nothing in it is a
pickle.
"""

import functools
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_specialm.base.artifacts import MARKER, check_fence
from megatron_specialm.base.control_group import ControlGroup
from megatron_specialm.base.errors import ArtifactError, CheckpointError
from megatron_specialm.base.files import (
    MANIFEST,
    ManifestEntry,
    fsync_path,
    link_folder,
    listed_files,
    publish_folder,
    read_json,
    seal_file,
    unlisted_files,
    verify_folder,
    write_json,
)
from megatron_specialm.base.tensors import TensorFiles, save_tensors

STATE, RESULT = "state.json", "result.json"
REMEDY = "remove the step's folder and run the same command again, which goes on from the step before"
_STEP = re.compile(r"step_(\d{7,})")
_PARTS = {part: re.compile(rf"{part}-\d{{5}}\.safetensors") for part in ("model", "optimizer")}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Progress:
    step: int
    best_step: int | None = None


@dataclass(frozen=True)
class _State:
    """What is read of a state here. `progress` is of a training that may go on from there."""

    progress: _Progress | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class _Result:
    step: int
    folder: str


@dataclass(frozen=True)
class Checkpoint:
    """A step: canonical weights, the optimizer's tensors, and the loop's state."""

    folder: Path
    weights: Mapping[str, torch.Tensor]
    optimizer_state: Mapping[str, torch.Tensor]
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
    peers: ControlGroup = ControlGroup(),  # noqa: B008 (this process alone)
) -> Path:
    """Write a step aside and publish it. All processes call this, each with the tensors that it is to write; it returns
    when the step is durable.

    Raises:
        OSError: a file cannot be written; on every process, whichever it befell. The step is not published.
        ArtifactError: another incarnation of this training has taken over.
    """
    final = step_folder(folder, step)

    def write() -> dict[str, ManifestEntry]:
        parts = {"model": weights, "optimizer": optimizer_state}
        seals = {}
        for path, tensors in ((aside / f"{part}-{peers.rank:05d}.safetensors", parts[part]) for part in parts):
            if tensors:
                save_tensors(tensors, path)
                seals[path.name] = seal_file(path)
        return seals

    def publish() -> None:
        check_fence(folder)
        write_json(aside / STATE, state)
        publish_folder(aside, final, sealed={name: seal for own in sealed for name, seal in own.items()})

    aside = peers.from_first(lambda: _make_aside(final))
    sealed = peers.agree(write)
    peers.from_first(publish)
    return final


def _make_aside(final: Path) -> Path:
    """A new folder beside a step's final place; what killed attempts have left of such is removed.

    Raises:
        ArtifactError: another incarnation of this training has taken over.
    """
    folder = final.parent
    check_fence(folder)
    for abandoned in folder.glob(".step_*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    aside = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"  # no other incarnation writes into it
    aside.mkdir(parents=True)
    return aside


def adopt_checkpoints(source: Path, folder: Path) -> None:
    """Give a training the steps of its trial, so that it goes on from there. Nothing is done where it has come as far from
    them: the newest step comes last, so with it all are there.

    Raises:
        ArtifactError: a step is damaged, or there is none, or the training has steps of another learning rate, or another
            incarnation of it has taken over.
    """
    steps = saved_steps(source)
    if not steps:
        raise ArtifactError(f"{source}: its checkpoints are gone; remove that folder to have that training done again")
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
        ArtifactError: another incarnation of this training has taken over.
    """
    for step in steps:
        final = step_folder(folder, step)
        aside = _make_aside(final)
        link_folder(step_folder(source, step), aside)
        check_fence(folder)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        fsync_path(folder)


def _refuse_steps_of_other_rates(folder: Path, *, like: Path) -> None:
    """A trial that was done again may have turned the choice; what was trained at the other rate by then is not ours to
    remove."""
    rate = _rate_of(like)
    for step in map(functools.partial(step_folder, folder), saved_steps(folder)):
        if rate is not None and (other := _rate_of(step)) not in (None, rate):
            raise CheckpointError(
                f"{step}: was trained at learning rate {other!r}, and the trials choose {rate!r} now, as one was done again: "
                f"move the step_* folders of {folder} away and run again, which trains at {rate!r}, or put the trials of "
                "before back from a copy"
            )


def _rate_of(step: Path) -> float | None:
    """None where the step does not say: a damaged one is passed over anyway."""
    try:
        return read_json(step / STATE, _State).learning_rate
    except ArtifactError:
        return None


class Saver:
    """Saves steps while training goes on. The tensors it is given must not change any more.

    A process that fails does not wait for its save, to which the others may never come: it must end, so that they hear of
    it. Hence the daemon threads.
    """

    def __init__(self, folder: Path, peers: ControlGroup) -> None:
        self._folder, self._peers = folder, peers
        self._pending: Future[None] | None = None

    def save(self, *, keep: int, beside: Collection[int | None], **step: Any) -> None:
        """Begin `save_checkpoint(**step)`, then `prune_checkpoints`.

        Raises:
            OSError: the step before could not be written.
        """
        self.wait()
        outcome: Future[None] = Future()

        def work() -> None:
            try:
                save_checkpoint(self._folder, peers=self._peers, **step)
                if self._peers.is_first:
                    prune_checkpoints(self._folder, step=step["step"], keep=keep, beside=beside)
                outcome.set_result(None)
            except BaseException as error:  # `wait` raises it
                outcome.set_exception(error)

        self._pending = outcome
        threading.Thread(target=work, name="save", daemon=True).start()

    def wait(self) -> None:
        """Return when the last step is durable.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def prune_checkpoints(folder: Path, *, step: int, keep: int, beside: Collection[int | None]) -> None:
    """Remove the steps up to `step`, which was just saved, but for the newest `keep` of them and those of `beside`. Later ones
    are those that were passed over: they are no checkpoints to fall back on, and are written anew when training is there."""
    up_to_here = [saved for saved in saved_steps(folder) if saved <= step]
    for saved in up_to_here[:-keep]:
        if saved not in beside:
            shutil.rmtree(step_folder(folder, saved))


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest step that training can go on from, and for each newer one, why it was passed over: it does not verify, or the
    best step so far does not, which would be the outcome if no later one was better."""
    skipped: list[str] = []
    for step in reversed(saved_steps(folder)):
        try:
            found = read_checkpoint(step_folder(folder, step)).folder
            progress = read_json(found / STATE, _State).progress
            if progress is not None and progress.best_step not in (None, step):
                read_checkpoint(step_folder(folder, progress.best_step))
            return found, skipped
        except ArtifactError as error:
            skipped.append(f"{step_folder(folder, step).name}: {error}")
    return None, skipped


def remove_unusable(folder: Path, steps: Iterable[int], *, last: int) -> None:
    """At the end of a training, remove those of some steps that do not verify, or are behind its `last` one: a finished
    artifact lists none that is damaged."""
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


def open_checkpoint(folder: Path) -> Checkpoint:
    """A verified step with all that training needs to go on.

    Raises:
        ArtifactError: its manifest lists no weights or no state, its state is of another step, or two of its files have a
            tensor of the same name.
    """
    listed = listed_files(folder)
    files = {part: [folder / name for name in sorted(listed) if own.fullmatch(name)] for part, own in _PARTS.items()}
    if STATE not in listed or not files["model"]:
        raise CheckpointError(f"{folder / MANIFEST}: lists no {'weights' if STATE in listed else STATE}: {REMEDY}")
    of = read_json(folder / STATE, _State, remedy=REMEDY).progress
    if of is not None and step_folder(folder.parent, of.step).name != folder.name:
        raise CheckpointError(f"{folder / STATE}: is of step {of.step}: {REMEDY}")
    weights, optimizer_state = (TensorFiles(files[part]) for part in _PARTS)
    return Checkpoint(folder, weights, optimizer_state, read_json(folder / STATE, dict[str, Any], remedy=REMEDY))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify a step, and open it.

    Raises:
        ArtifactError: a file is missing, cut short or changed; or see `open_checkpoint`.
    """
    verify_folder(folder)
    for path in unlisted_files(folder):
        logger.warning("%s: is not read: %s does not list it", path, MANIFEST)
    return open_checkpoint(folder)


def read_model(folder: Path) -> Mapping[str, torch.Tensor]:
    """The canonical weights of a step; see `read_checkpoint`."""
    return read_checkpoint(folder).weights


def declare_final(folder: Path, *, step: int) -> None:
    """Name the step that is the outcome of training: the last, or with early stopping the best.

    Raises:
        ArtifactError: the step is damaged or gone, or another incarnation of this training has taken over.
    """
    verify_folder(step_folder(folder, step))
    check_fence(folder)
    write_json(folder / RESULT, asdict(_Result(step, step_folder(folder, step).name)))


def find_final(folder: Path) -> Path:
    """The step folder that is the outcome of a finished training task.

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


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a training's folder, in order; whether these are whole is another question."""
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match.group(1)) for match in found if match)
