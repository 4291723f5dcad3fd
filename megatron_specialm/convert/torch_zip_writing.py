"""Files that torch.load reads, written slice by slice: no tensor is ever whole in memory. See `torch_zip` for the format."""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import named
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.safe_pickle import Inert
from megatron_specialm.convert.torch_zip import STORAGES

SLICE_BYTES = 2**26
_ALIGNMENT = 64
_ROOT = "archive"
_CLASSES = {dtype: getattr(torch, f"{name}Storage") for name, dtype in STORAGES.items()}


def write_torch_zip(path: Path, content: Any) -> None:
    """Write a new file as torch.save does.

    Args:
        content: what pickle can write, with lazy or torch's tensors in it, and `Inert` for objects of classes that are not
            imported here, as of DeepSpeed.

    Raises:
        CheckpointError: a tensor is of a type that torch.save writes in another form.
        OSError: with the file's name, as of a full disk.
    """
    data = io.BytesIO()
    pickler = _Pickler(data)
    pickler.dump(content)
    with named(path), path.open("xb") as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, "data.pkl", [data.getvalue()], len(data.getvalue()))
        _add(archive, "byteorder", [b"little"], 6)
        for key, tensor in enumerate(pickler.tensors):
            size = math.prod(tensor.shape) * tensor.dtype.itemsize
            _add(archive, f"data/{key}", (memoryview(_bytes(part)) for part in slices(tensor)), size)
        _add(archive, "version", [b"3\n"], 2)


def slices(tensor: LazyTensor) -> Iterator[torch.Tensor]:
    """A tensor in parts along the first dimension: of at most `SLICE_BYTES`, or of one row."""
    shape = tuple(tensor.shape)
    if not shape:
        yield tensor[()]
        return
    row = max(1, math.prod(shape[1:]) * tensor.dtype.itemsize)
    step = max(1, SLICE_BYTES // row)
    for start in range(0, shape[0], step):
        yield tensor[slice(start, min(start + step, shape[0])),]


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _add(archive: zipfile.ZipFile, name: str, parts: Any, size: int) -> None:
    """Add a record whose bytes begin at a multiple of 64, as torch aligns them."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    info.file_size = size  # by which zipfile decides on the form for large records
    large = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0
    assert archive.fp is not None
    start = archive.fp.tell() + 30 + len(info.filename) + 4 + large
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    written = 0
    with archive.open(info, "w") as record:
        for part in parts:
            written += record.write(part)
    assert written == size, f"{name}: {written} bytes, not {size}"


_PythonPickler: Any = pickle._Pickler  # the one in C cannot name a class without importing it


class _Pickler(_PythonPickler):
    """Protocol 2, with each tensor's storage as a persistent id."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.tensors: list[LazyTensor] = []
        self._keys: dict[int, int] = {}

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _Global):
            return value.name
        if isinstance(value, Inert):
            return _Global(value.name), value.arguments, value.state
        if isinstance(value, type) or not (hasattr(value, "shape") and hasattr(value, "dtype")):
            return NotImplemented
        if value.dtype not in _CLASSES:
            raise CheckpointError(f"tensors of {value.dtype} cannot be written in this format: choose another --dtype")
        key = self._keys.setdefault(id(value), len(self.tensors))
        if key == len(self.tensors):
            self.tensors.append(value)
        shape = tuple(value.shape)
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        storage = _Storage(("storage", _CLASSES[value.dtype], str(key), "cpu", math.prod(shape)))
        return torch._utils._rebuild_tensor_v2, (storage, 0, shape, stride, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        return value.identifier if isinstance(value, _Storage) else None

    def save_global(self, value: Any, name: str | None = None) -> None:
        if isinstance(value, _Global):
            module, _, own = value.name.rpartition(".")
            self.write(f"c{module}\n{own}\n".encode())
            self.memoize(value)
        else:
            super().save_global(value, name)


class _Global:
    """The name of a class, written without importing it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self) -> None: ...  # pickle asks whether it could be called


class _Storage:
    """Stands for a storage in the pickle."""

    def __init__(self, identifier: tuple[Any, ...]) -> None:
        self.identifier = identifier
