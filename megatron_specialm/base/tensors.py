"""Tensors in safetensors files. torch is imported when there are some to write, or to read as its own."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import REMAKE, give_usual_mode, reading


class TensorFiles(Mapping[str, Any]):
    """The tensors of several safetensors files, each read when it is asked for: torch's, or NumPy's arrays.

    Raises:
        ArtifactError: a file is missing or damaged.
        CheckpointError: two files have a tensor of the same name, or one is asked for that none has.
    """

    def __init__(self, paths: Iterable[Path], *, framework: Literal["pt", "np"] = "pt") -> None:
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            with reading(path, form="a file of tensors"):
                file = safe_open(path, framework=framework)
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if name in self._files:
                    raise CheckpointError(f"{path}: has {name}, which {self._files[name][0]} has too: {REMAKE}")
                self._files[name] = path, file

    def __getitem__(self, name: str) -> Any:
        if name not in self._files:
            folders = sorted({str(path.parent) for path, _ in self._files.values()})
            raise CheckpointError(f"{', '.join(folders) or 'no file'}: has no tensor {name}: it is of another model")
        path, file = self._files[name]
        with reading(path, form="a file of tensors"):
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def save_tensors(tensors: Mapping[str, Any], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write torch's tensors, with the mode that any new file gets.

    Raises:
        OSError: the operating system refuses, as with a full disk.
    """
    from safetensors.torch import save_file

    with system_errors(path):
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    give_usual_mode(path)


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses while safetensors writes becomes its own error again; safetensors has it in words."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(number.group(1))
            raise OSError(code, os.strerror(code), str(path)) from None
        raise
