"""Folders of Megatron's checkpoints: `latest_checkpointed_iteration.txt` beside `iter_0000100`, or `release`."""

from pathlib import Path

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_regular, write_text
from megatron_specialm.convert.safe_pickle import COPY_AGAIN, decoding

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_folder(path: Path) -> Path:
    """The folder of the last iteration, of a folder of iterations; any other path itself.

    Raises:
        CheckpointError: the last iteration is not there.
    """
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    with decoding(tracker, "the number of an iteration"):
        text = read_regular(tracker, most_bytes=100).decode().strip()
        folder = path / ("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker}: says {text}, and {folder} does not exist: {COPY_AGAIN}")
    return folder


def new_iteration(path: Path, step: int | None) -> Path:
    """Make the folder of an iteration, `release` if it has no number, and the tracker that names it."""
    folder = path / ("release" if step is None else f"iter_{step:07d}")
    folder.mkdir(parents=True)
    write_text(path / TRACKER, "release" if step is None else str(step))
    return folder
