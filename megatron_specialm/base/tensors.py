"""Writing safetensors files. torch is imported when there are tensors to write."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_specialm.base.files import give_usual_mode


def save_tensors(tensors: Mapping[str, Any], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write torch's tensors to a file with the mode that any new file gets: safetensors makes it the owner's alone.

    Raises:
        OSError: the operating system refuses, as with a full disk.
    """
    from safetensors.torch import save_file

    with system_errors(path):
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    give_usual_mode(path)


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turn a SafetensorError that quotes an error of the operating system, as of a full disk, back into an OSError with the
    number and the path."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(number.group(1))
            raise OSError(code, os.strerror(code), str(path)) from None
        raise
