"""`.pt` files of torch.save, read without torch.load: the pickle through `safe_pickle`, the tensors where they lie.

The file is a zip archive without compression: `ROOT/data.pkl`, and one record `ROOT/data/KEY` for each storage, which tensors
refer to by a persistent id. DCP's `.distcp` files are such archives one behind the other.
"""

import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.safe_pickle import (
    COPY_AGAIN,
    MOST_BYTES,
    PLAIN,
    Inert,
    Maker,
    decoding,
    parse_pickle,
)
from megatron_specialm.convert.stored import FileTensor, last_element

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn",
        "float8_e5m2",
    )
}  # fmt: skip
STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LITTLE = b"little"


def read_torch_zip(
    path: Path, allowed: Mapping[str, Any] | None = None, *, start: int = 0, length: int | None = None
) -> Any:
    """The content of a file, or of `length` bytes of it from `start` on, with a `FileTensor` for each tensor.

    Args:
        allowed: globals that the pickle may name, beside torch's tensors and plain classes; see `parse_pickle`.

    Raises:
        CheckpointError: it is damaged, in torch's format before 1.6, compressed, or asks for another global.
    """
    with decoding(path, "a file of torch.save"), path.open("rb") as file:
        window = _Window(file, start, length)
        if window.read(2) == b"\x80\x02":
            raise ValueError(
                "it is in the format before torch 1.6: load and save it with a newer torch where you trust it"
            )
        with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
            records = {info.filename: info for info in archive.infolist()}
            root = next((name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")), None)
            if root is None:
                raise ValueError("it has no data.pkl")
            records = {name: info for name, info in records.items() if name.startswith(root)}
            places = _Places(path, window, records, root)  # before any record is read: none of them is compressed
            if records[f"{root}data.pkl"].file_size > MOST_BYTES:
                raise ValueError("its pickle is too large")
            if f"{root}byteorder" in records:
                with archive.open(f"{root}byteorder") as record:
                    if record.read(len(_LITTLE) + 1) != _LITTLE:
                        raise ValueError("it was written on a machine of another byte order")
            content = archive.read(f"{root}data.pkl")
    return parse_pickle(content, path, {**PLAIN, **TORCH, **(allowed or {})}, persistent=places.storage)


def read_state_dict(path: Path, allowed: Mapping[str, Any] | None = None) -> dict[str, FileTensor]:
    """The tensors of a file by their names; see `read_torch_zip`.

    Raises:
        CheckpointError: its content is anything but a dict of tensors.
    """
    content = read_torch_zip(path, allowed)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict of tensors: {COPY_AGAIN}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, FileTensor):
            raise CheckpointError(
                f"{path}: not a dict of tensors: the key {name!s:.60} holds a {type(tensor).__name__}: save the model's "
                "state_dict() alone"
            )
    return content


class _Window:
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int | None) -> None:
        self._file, self.start = file, start
        size = file.seek(0, 2)
        self.length = size - start if length is None else length
        if start < 0 or self.length < 0 or start + self.length > size:
            raise ValueError(f"it has {size} bytes, and bytes {start} to {start + self.length} are looked for")
        self.seek(0)

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if (place := (0, self.tell(), self.length)[whence] + offset) < 0:
            raise OSError("a place before the start")
        self._file.seek(self.start + place)
        return place

    def tell(self) -> int:
        return self._file.tell() - self.start if not self._file.closed else 0

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.length - self.tell())
        return self._file.read(left if count is None or count < 0 else min(count, left))

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Storage:
    """A storage of an archive: where its bytes are, and how many."""

    path: Path
    start: int
    size: int
    dtype: torch.dtype | None


class _Places:
    """Where the records of an archive lie in the file."""

    def __init__(self, path: Path, window: _Window, records: Mapping[str, zipfile.ZipInfo], root: str) -> None:
        self._path, self._root = path, root
        self._starts: dict[str, tuple[int, int]] = {}
        for name, info in records.items():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise ValueError(f"{name} is compressed or encrypted, which torch.save never does")
            window.seek(info.header_offset)
            magic, name_length, extra_length = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
            start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            if magic != b"PK\3\4" or start + info.file_size > window.length:
                raise ValueError(f"{name}: its header is wrong")
            self._starts[name] = window.start + start, info.file_size

    def storage(self, identifier: Any) -> _Storage:
        """The storage of a persistent id: ('storage', class, key, device, elements)."""
        kind, dtype, key, _, count = identifier
        if kind != "storage" or f"{self._root}data/{key}" not in self._starts:
            raise ValueError(f"it refers to {kind} {key!r}, which is not in the file")
        start, size = self._starts[f"{self._root}data/{key}"]
        if count < 0 or count * (1 if dtype is None else dtype.itemsize) > size:
            raise ValueError(f"storage {key} has {size} bytes, fewer than the {count} elements that it should")
        return _Storage(self._path, start, size, dtype)


def _tensor(
    storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype | None = None
) -> FileTensor:
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or min(offset, *shape, *stride, 0) < 0:
        raise ValueError("a tensor has no storage, or lies before it")
    if (dtype := dtype or storage.dtype) is None:
        raise ValueError("a tensor has no type")
    end = offset + (1 + last_element(shape, stride) if math.prod(shape) else 0)
    if max(end, math.prod(shape)) * dtype.itemsize > storage.size:  # an expanded one would be small in the file alone
        raise ValueError(f"a tensor of shape {tuple(shape)} needs {end} elements, more than its storage has")
    return FileTensor(storage.path, storage.start + offset * dtype.itemsize, dtype, tuple(shape), tuple(stride))


TORCH: dict[str, Any] = {
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": None,
    "torch.Size": Maker(tuple),
    "torch.device": Maker(lambda *_: None),
    "torch.serialization._get_layout": Maker(lambda name: name),
    "torch._utils._rebuild_tensor_v2": Maker(
        lambda data, offset, shape, stride, *_: _tensor(data, offset, shape, stride)
    ),
    "torch._utils._rebuild_tensor_v3": Maker(
        lambda data, offset, shape, stride, _, __, dtype, *___: _tensor(data, offset, shape, stride, dtype)
    ),
    "torch._tensor._rebuild_from_type_v2": Maker(
        lambda made, _, arguments, __: made.make(*arguments)
    ),  # with attributes
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    "torch._utils._rebuild_parameter": Maker(lambda data, *_: data),
    "torch._utils._rebuild_parameter_with_state": Maker(lambda data, *_: data),
}


def settings_of(namespace: Any) -> dict[str, Any]:
    """The options in an `argparse.Namespace`, with the value of each enumeration; empty for anything else."""
    if not isinstance(namespace, Inert) or not isinstance(namespace.state, dict):
        return {}
    return {
        name: value.arguments[0] if isinstance(value, Inert) and len(value.arguments) == 1 else value
        for name, value in namespace.state.items()
    }
