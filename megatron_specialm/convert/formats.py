"""The formats that are recognized and written."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert import canonical_folder, huggingface_folder
from megatron_specialm.convert.source import Order, Source, Target


class Format(NamedTuple):
    """How a format is recognized, read and written."""

    recognize: Callable[[Path], bool]
    open: Callable[[Path], Source]
    target: Callable[[Order], Target]


FORMATS = {
    canonical_folder.FORMAT: Format(
        canonical_folder.recognize, canonical_folder.open_folder, canonical_folder.CanonicalTarget
    ),
    huggingface_folder.FORMAT: Format(
        huggingface_folder.recognize, huggingface_folder.open_folder, huggingface_folder.HuggingFaceTarget
    ),
}


def open_source(path: Path) -> Source:
    """Open a checkpoint of any format, which is recognized by its content.

    Raises:
        CheckpointError: it is of no known format, not complete, or of a model that we do not have.
        ArtifactError: a file is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder: name the folder of a checkpoint")
    for known in FORMATS.values():
        if known.recognize(path):
            return known.open(path)
    files = ", ".join(sorted(found.name for found in path.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"{path}: a checkpoint of no known format ({', '.join(FORMATS)}). It has {files}. Name the folder in which the "
        "checkpoint's own files are"
    )
