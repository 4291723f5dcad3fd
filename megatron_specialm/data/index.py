"""Reading and checking the index of megatron-core's IndexedDataset.

    9 bytes MMIDIDX and two zeros, 8 version (1), 1 type of the tokens, 8 windows N, 8 documents D + 1
    (N,) int32 tokens of each window, (N,) int64 its first byte in the .bin file, (D + 1,) int64 each document's first window

Megatron-Core's own reader accepts any numbers, and reports other errors by `assert`.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from megatron_specialm.base.arrays import read_values
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import REMAKE, reading

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}  # of the token types of a store


class Index(NamedTuple):
    """Memory-mapped: tokens of each window (N,) int32, and its first byte (N,) int64."""

    lengths: np.ndarray
    starts: np.ndarray


def read_index(path: Path, *, dtype: DTypeLike) -> Index:
    """Map an index.

    Args:
        dtype: of the tokens.

    Raises:
        ArtifactError: it is missing, damaged, or of another token type.
    """
    with reading(path, form="an index of tokens"), path.open("rb") as file:
        magic, version, code, windows, documents = _HEADER.unpack(file.read(_HEADER.size))
    if (magic, version, code) != (_MAGIC, 1, _CODES[np.dtype(dtype)]):
        raise ArtifactError(
            f"{path}: not the index of windows of {np.dtype(dtype)} (its header: {magic!r}, version {version}, type {code}): "
            f"{REMAKE}"
        )
    size = windows * (4 + 8) + documents * 8
    numbers = read_values(path, dtype=np.uint8, shape=(size,), start=_HEADER.size, mapped=True)
    lengths, starts = numbers[: 4 * windows], numbers[4 * windows : 12 * windows]
    return Index(lengths.view(np.int32), starts.view(np.int64))
