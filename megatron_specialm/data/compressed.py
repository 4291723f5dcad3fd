"""The bytes of a file, decompressed where its name says that it is compressed.

The name decides: `.gz`, `.zst`, `.bz2` or `.xz`, in any case. A file whose content begins as another format than its name
says is refused, because either may be the mistake. Every format is read member after member (zstd: frame, xz: stream),
so that files which were concatenated or written in portions are read whole, and a cut inside a member is noticed.
Zero bytes between and behind members are padding, as tapes and some writers leave it.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_specialm.base.errors import DataError

READ_BYTES = 1 << 20  # of a file at a time
WINDOW_BYTES = 1 << 31  # the longest window that `zstd --long=31` writes; so much memory a reader of such a file needs


class _Format(NamedTuple):
    """`begins`: the first bytes of a file, one of these; `member`: makes a reader of one member, with the methods of the
    standard library's (`decompress`, `eof`, `unused_data`)."""

    name: str
    begins: tuple[bytes, ...]
    member: Callable[[], Any]


def _zstd_frame() -> Any:
    import zstandard  # a reader of rarer files: not before one is needed

    return zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj()


FORMATS = {
    ".gz": _Format("gzip", (b"\x1f\x8b",), lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)),
    # A skippable frame, which may come first, begins with one of 16 numbers.
    ".zst": _Format(
        "zstd", (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16))), _zstd_frame
    ),
    ".bz2": _Format("bzip2", (b"BZh",), bz2.BZ2Decompressor),
    ".xz": _Format("xz", (b"\xfd7zXZ\x00",), lzma.LZMADecompressor),
}


def plain_name(path: Path) -> str:
    """The file's name in small letters, without the ending that says how it is compressed."""
    name = path.name.lower()
    return name.removesuffix(path.suffix.lower()) if path.suffix.lower() in FORMATS else name


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content of a file in blocks, decompressed.

    Raises:
        DataError: the file cannot be read, is not what its name says, is cut short, damaged, or needs a dictionary.
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
        what = (
            f"is compressed with {found.name}"
            if found
            else f"begins with {first[:8]!r}, as no format does that is read here"
        )
        raise DataError(
            f"{path}: is not {named.name}, as its name says, but {what}: correct its name or compress it so"
        )
    content = _chain(first, blocks)
    yield from content if named is None else _members(path, named, content)


def _raw_blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                yield block
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}: correct its permissions or path") from None


def _chain(first: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from blocks


def _members(path: Path, kind: _Format, blocks: Iterator[bytes]) -> Iterator[bytes]:
    member = None  # between members there is none
    for block in blocks:
        while block := block if member else block.lstrip(b"\0"):
            member = member or kind.member()
            try:
                content = member.decompress(block)
            except Exception as error:  # zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError of bz2: one base only
                raise DataError(f"{path}: {_reason(kind, error)}") from None
            yield content
            block = member.unused_data if member.eof else b""
            member = None if member.eof else member
    if member:
        raise DataError(f"{path}: cut short: its last {kind.name} member has no end: copy it again")


def _reason(kind: _Format, error: Exception) -> str:
    """What an error of a library means, and what to do about it."""
    if "ictionary" in str(error):
        return f"compressed with a {kind.name} dictionary, which is no part of the file ({error}): compress it without"
    if isinstance(error, MemoryError) or "allocation" in str(error):
        return f"too little memory for the window that it was compressed with ({error}): compress it without --long"
    return f"damaged: not {kind.name} all through ({error}): copy it again"
