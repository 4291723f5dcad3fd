"""Writing a safetensors file tensor by tensor, in any order and from several threads: nothing is held in memory."""

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class SafetensorsWriter:
    """A file of tensors whose types and shapes are known before their values.

    Every tensor is written exactly once: another, or one twice, is a bug; one that was not written makes `close` fail.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._path, self._offsets, end = path, {}, 0
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            self._offsets[name] = end, (dtype, tuple(shape))
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing, self._lock = set(tensors), threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(self._file, len(text).to_bytes(8, "little") + text)
        if end:
            os.posix_fallocate(self._file, self._start, end)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, converted to the type of its place.

        Raises:
            OSError: the disk is full.
        """
        offset, (dtype, shape) = self._offsets[name]
        assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
        with self._lock:
            assert name in self._missing, f"{name} is written twice"
            self._missing.remove(name)
        write_at(self._file, tensor.to(dtype), self._start + offset)

    def close(self) -> None:
        """Close the file. All tensors have been written."""
        os.close(self._file)
        assert not self._missing, f"{self._path}: {sorted(self._missing)[0]} was not written"


def write_at(file: int, tensor: torch.Tensor, offset: int) -> None:
    """Write a tensor's elements, row by row, to a file at a byte offset."""
    rest = elements(tensor)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def elements(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's elements, row by row."""
    if not tensor.numel():
        return memoryview(b"")
    flat: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
