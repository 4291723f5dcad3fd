"""The bytes of a file, decompressed by the extension of its name: `.gz`, `.zst`, `.bz2` or `.xz`, in upper or lower case.

A file whose first bytes are of another format than its name is refused, because either may be wrong. All members of a file
(zstd: frames, xz: streams) are read, so that concatenated files are read to the end, and a file that ends within a member is
refused. Zero bytes between and after members are padding.
"""

import bz2
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_specialm.base.errors import DataError

READ_BYTES = 1 << 20  # read at a time
WINDOW_BYTES = 1 << 31  # the largest window of `zstd --long=31`, and the memory for reading such a file


class _Format(NamedTuple):
    """begins: the possible first bytes of a file. member: makes a decompressor of one member, with the interface of the
    standard library's (`decompress`, `eof`, `unused_data`)."""

    name: str
    begins: tuple[bytes, ...]
    member: Callable[[], Any]


def _zstd_frame() -> Any:
    import zstandard  # imported only when needed: few files have this format

    return zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj()


FORMATS = {
    ".gz": _Format("gzip", (b"\x1f\x8b",), lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)),
    # The second kind is of skippable frames, which may come first.
    ".zst": _Format(
        "zstd", (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16))), _zstd_frame
    ),
    ".bz2": _Format("bzip2", (b"BZh",), bz2.BZ2Decompressor),
    ".xz": _Format("xz", (b"\xfd7zXZ\x00",), lzma.LZMADecompressor),
}


def plain_name(path: Path) -> str:
    """The file's name in lower case, without the extension of its compression."""
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in FORMATS else name


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content of a file in blocks, decompressed.

    Raises:
        DataError: the file cannot be read, has another format than its name, is cut short, damaged, or needs a dictionary.
    """
    named = FORMATS.get(path.suffix.lower())
    blocks = _raw_blocks(path)
    first = next(blocks, b"")
    found = next((known for known in FORMATS.values() if first.startswith(known.begins)), None)
    if named is None and found is not None:
        ending = next(ending for ending, known in FORMATS.items() if known is found)
        raise DataError(
            f"{path}: is compressed with {found.name}, and its name does not say so: add {ending} to its name"
        )
    if named is not None and not first:
        raise DataError(f"{path}: holds no byte, and the smallest {named.name} file has more: cut short: copy it again")
    if named is not None and found is not named:
        begins = f"begins with {first[:8]!r}, as no format does that is read here"
        what = f"is compressed with {found.name}" if found else begins
        raise DataError(
            f"{path}: is not {named.name}, as its name says, but {what}: correct its name or compress it so"
        )
    content = itertools.chain([first], blocks)
    yield from content if named is None else _members(path, named, content)


def _raw_blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                yield block
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}: correct its permissions or path") from None


def _members(path: Path, kind: _Format, blocks: Iterable[bytes]) -> Iterator[bytes]:
    member = None  # between members
    for block in blocks:
        while block := block if member else block.lstrip(b"\0"):
            member = member or kind.member()
            try:
                content = member.decompress(block)
            except Exception as error:  # zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError of bz2
                raise DataError(f"{path}: {_reason(kind, error)}") from None
            yield content
            block = member.unused_data if member.eof else b""
            member = None if member.eof else member
    if member:
        raise DataError(f"{path}: cut short: its last {kind.name} member has no end: copy it again")


def _reason(kind: _Format, error: Exception) -> str:
    """The cause of a library's error, and the fix."""
    if "ictionary" in str(error):
        return f"compressed with a {kind.name} dictionary, which is no part of the file ({error}): compress it without"
    if isinstance(error, MemoryError) or "allocation" in str(error):
        return f"too little memory for the window that it was compressed with ({error}): compress it without --long"
    return f"damaged: not {kind.name} all through ({error}): copy it again"
