"""Checkpoints that verify themselves and fit any layout.

    step_0000400/           model-RANK.safetensors  optimizer-RANK.safetensors  state.json
                            manifest.json (sizes and SHA-256)
    result.json             at the end of training: which step is the outcome

Tensors are whole and canonical (`model/weights.py`); each process writes those that fall to it, so what a file holds is
of no consequence to a reader. A step is written aside, fsynced, hashed and renamed: a `step_N` folder is whole by
construction; a reader checks the hashes all the same. Nothing in it is a pickle.
"""

import functools
import os
import re
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_specialm.base.artifacts import refuse_if_taken_over
from megatron_specialm.base.errors import ArtifactError, CheckpointError
from megatron_specialm.base.files import (
    FileSeal,
    fsync_path,
    give_usual_mode,
    link_folder,
    publish_folder,
    read_json,
    seal_file,
    verify_folder,
    write_json,
)
from megatron_specialm.train.peers import Peers

_STEP = re.compile(r"step_(\d{7,})")


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of several safetensors files, each read when it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


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
    peers: Peers = Peers(),  # noqa: B008 (this process alone)
) -> Path:
    """Write a step aside and publish it. All processes call this, each with the tensors that it is to write; it returns
    when the step is durable.

    Raises:
        OSError: a file cannot be written; on every process, whichever it befell. The step is not published.
        ArtifactError: another incarnation of this training has taken over.
    """
    final = step_folder(folder, step)

    def write() -> dict[str, FileSeal]:
        parts = {"model": weights, "optimizer": optimizer_state}
        seals = {}
        for path, tensors in ((aside / f"{part}-{peers.rank:05d}.safetensors", parts[part]) for part in parts):
            if tensors:
                _save_file(tensors, path)
                seals[path.name] = seal_file(path)
        return seals

    def publish() -> None:
        refuse_if_taken_over(folder)
        write_json(aside / "state.json", state)
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
    refuse_if_taken_over(folder)
    for abandoned in folder.glob(".step_*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    aside = folder / f".{final.name}.{secrets.token_hex(4)}.tmp"  # no other incarnation writes into it
    aside.mkdir(parents=True)
    return aside


def adopt_checkpoints(source: Path, folder: Path) -> None:
    """Give a training the steps of its trial, so that it goes on from there. Nothing is done where it has come as far from
    them: the newest step comes last, so with it all are there. Steps of another learning rate are removed.

    Raises:
        ArtifactError: a step is damaged, or there is none, or another incarnation of this training has taken over.
    """
    steps = saved_steps(source)
    if not steps:
        raise ArtifactError(f"{source}: its checkpoints are gone; remove that folder to have that training done again")
    _remove_steps_of_other_rates(folder, like=step_folder(source, steps[-1]))
    own = saved_steps(folder)
    if own and own[-1] >= steps[-1]:
        return
    try:
        for step in steps:
            verify_folder(step_folder(source, step))
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
        refuse_if_taken_over(folder)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        fsync_path(folder)


def _remove_steps_of_other_rates(folder: Path, *, like: Path) -> None:
    """A trial that was done again may have turned the choice."""
    rate = _rate_of(like)
    for step in map(functools.partial(step_folder, folder), saved_steps(folder)):
        if rate is not None and _rate_of(step) not in (None, rate):
            shutil.rmtree(step)


def _rate_of(step: Path) -> float | None:
    """None where the step does not say: a damaged one is passed over anyway."""
    try:
        return float(read_json(step / "state.json")["learning_rate"])
    except (ArtifactError, KeyError, TypeError, ValueError):
        return None


def _save_file(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors; what the operating system refuses is its own error, which safetensors wraps in words."""
    try:
        save_file(dict(tensors), path)
        give_usual_mode(path)
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(number.group(1))
            raise OSError(code, os.strerror(code), str(path)) from None
        raise


class Saver:
    """Saves steps while training goes on. The tensors it is given must not change any more.

    A process that fails does not wait for its save, to which the others may never come: it must end, so that they hear of
    it. Hence the daemon threads.
    """

    def __init__(self, folder: Path, peers: Peers) -> None:
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
                    prune_checkpoints(self._folder, keep=keep, beside=beside)
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


def prune_checkpoints(folder: Path, *, keep: int, beside: Collection[int | None]) -> None:
    """Remove all steps but the newest `keep` and those of `beside`."""
    for step in saved_steps(folder)[:-keep]:
        if step not in beside:
            shutil.rmtree(step_folder(folder, step))


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest step that verifies, and for each newer one that does not, why it was passed over."""
    skipped: list[str] = []
    for step in reversed(saved_steps(folder)):
        try:
            verify_folder(step_folder(folder, step))
            return step_folder(folder, step), skipped
        except ArtifactError as error:
            skipped.append(f"{step_folder(folder, step).name}: {error}")
    return None, skipped


def open_checkpoint(folder: Path) -> Checkpoint:
    """A verified step with all that training needs to go on."""
    return Checkpoint(
        folder,
        TensorFiles(sorted(folder.glob("model-*.safetensors"))),
        TensorFiles(sorted(folder.glob("optimizer-*.safetensors"))),
        read_json(folder / "state.json"),
    )


def read_model(folder: Path) -> Mapping[str, torch.Tensor]:
    """The canonical weights of a step, verified.

    Raises:
        ArtifactError: a file is missing, cut short or changed.
    """
    verify_folder(folder)
    return open_checkpoint(folder).weights


def declare_final(folder: Path, *, step: int) -> None:
    """Name the step that is the outcome of training: the last, or with early stopping the best.

    Raises:
        ArtifactError: another incarnation of this training has taken over.
    """
    refuse_if_taken_over(folder)
    write_json(folder / "result.json", {"step": step, "folder": step_folder(folder, step).name})


def find_final(folder: Path) -> Path:
    """The step folder that is the outcome of a finished training task."""
    return folder / read_json(folder / "result.json")["folder"]


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint in a training's folder, in order; whether these are whole is another question."""
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match.group(1)) for match in found if match)
