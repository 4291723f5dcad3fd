"""Arrays in files: `.npy`, `.npz`, and raw values. The only module that reads or maps them.

A reader passes the expected type and shape. They are compared with the file's header and size before any value is read. So a
file of another kind, or one that was truncated or has grown, raises an `ArtifactError` that names it. Values that are read into
memory must be finite.

The disk space of a writable memory map is allocated first: if a disk fills up under a map, the process dies of SIGBUS.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import REMAKE, atomic_path, reading

Dimensions = tuple[int | None, ...]  # None: any size


def read_array(path: Path, *, dtype: DTypeLike, shape: Dimensions, mapped: bool = False) -> np.ndarray:
    """Read an `.npy` file.

    Args:
        mapped: as a memory map, of which only header and size are checked; otherwise values must be finite too.

    Raises:
        ArtifactError: the file is missing, damaged, of another type or shape, or has values that are not finite.
    """
    with reading(path, form="an array of NumPy"), path.open("rb") as file:
        found, own, start = _header(file)
        _check(path, found, own, dtype, shape)
        return _values(path, start, dtype, own, mapped=mapped)


def read_values(path: Path, *, dtype: DTypeLike, shape: Dimensions, start: int = 0, mapped: bool = False) -> np.ndarray:
    """Read raw values from byte `start` to the end of a file; otherwise like `read_array`. The shape (None,) reads all of
    them."""
    with reading(path, form="such values"):
        there = (path.stat().st_size - start) // np.dtype(dtype).itemsize
        own = tuple(there if size is None else size for size in shape)
        return _values(path, start, dtype, own, mapped=mapped)


def read_arrays(path: Path, arrays: Mapping[str, tuple[DTypeLike, Dimensions]]) -> dict[str, np.ndarray]:
    """Read an `.npz` file with these arrays: name to type and shape.

    Raises:
        ArtifactError: as in `read_array`, or an array is missing.
    """
    with reading(path, form="arrays of NumPy"), np.load(path, allow_pickle=False) as file:
        if missing := sorted(arrays.keys() - set(file.files)):
            raise ArtifactError(f"{path}: lacks {missing[0]}: {REMAKE}")
        found = {name: file[name] for name in arrays}
        for name, (dtype, shape) in arrays.items():
            _check(f"{path}: {name}", found[name].dtype, found[name].shape, dtype, shape)
            _check_finite(f"{path}: {name}", found[name])
        return found


@contextlib.contextmanager
def new_array(path: Path, *, dtype: DTypeLike, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A memory-mapped array to fill. When the context ends it becomes the `.npy` file.

    Raises:
        OSError: the disk has no room for it.
    """
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            descr = npy.dtype_to_descr(np.dtype(dtype))
            npy.write_array_header_2_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
            file.flush()
            _allocate(file, file.tell() + _size(dtype, shape), path)
        array = np.load(temporary, mmap_mode="r+", allow_pickle=False)
        yield array
        array.flush()


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an `.npy` file, atomically and durably.

    Raises:
        OSError: the disk has no room for it.
    """
    with new_array(path, dtype=array.dtype, shape=array.shape) as values:
        values[...] = array


def _allocate(file: BinaryIO, size: int, path: Path) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        reason = f"{error.strerror}; it takes {size:,} bytes, and {free:,} are free"
        raise OSError(error.errno, reason, str(path)) from None


def _header(file: BinaryIO) -> tuple[np.dtype, tuple[int, ...], int]:
    """The type and shape of an `.npy` file, and where its values begin."""
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format")
    shape, in_columns, dtype = read(file)
    if in_columns and len(shape) > 1:
        raise ValueError("its values stand column after column")
    return dtype, shape, file.tell()


def _check(what: object, found: np.dtype, own: tuple[int, ...], dtype: DTypeLike, shape: Dimensions) -> None:
    wanted = np.dtype(dtype)
    fits = len(own) == len(shape) and all(b is None or a == b for a, b in zip(own, shape, strict=True))
    if found != wanted or not fits or min(own, default=0) < 0:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ArtifactError(f"{what}: {found} of shape {own}, where {wanted} of shape ({sizes}) belongs: {REMAKE}")


def _values(path: Path, start: int, dtype: DTypeLike, shape: tuple[int, ...], *, mapped: bool) -> np.ndarray:
    size, wanted = path.stat().st_size, start + _size(dtype, shape)
    if size != wanted:
        raise ArtifactError(
            f"{path}: {size} bytes, and {wanted} are {np.dtype(dtype)} of shape {shape}: cut short or overwritten: {REMAKE}"
        )
    if wanted == start:  # an empty array cannot be mapped
        return np.empty(shape, np.dtype(dtype))
    if mapped:  # a plain array on the mapped file: slices of np.memmap itself cost three times as much
        return np.asarray(np.memmap(path, dtype, mode="r", offset=start, shape=shape))
    array = np.fromfile(path, dtype, offset=start).reshape(shape)
    _check_finite(path, array)
    return array


def _check_finite(what: object, array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ArtifactError(f"{what}: has values that are not finite: {REMAKE}")


def _size(dtype: DTypeLike, shape: tuple[int, ...]) -> int:
    return np.dtype(dtype).itemsize * math.prod(shape)
