"""SHA-256 of many large files, with a cache: a file is read again only where it may have changed.

    <cache>.json   per file: its size, times and inode, when it was read, and its SHA-256. Files below the cache's folder have
                   their relative paths, so that a folder that is moved, or reached by a link, keeps its cache.

A file whose size, times and inode are equal counts as unchanged. Users can set times of modification, but not of change
(ctime). Both have the resolution of the filesystem's clock, so a file that was changed shortly before it was read may have
changed again with the same times, and is read again (as Git does with its index). The same holds for a time of reading in the
future, from a clock that has been set back. The device is not compared: a network filesystem has another number on each node.
Hashing waits for the disk and releases the GIL, so several files are read at a time.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import atomic_path, json_text, read_json, sha256_file

THREADS = 16  # more readers do not make a filesystem faster
KEEP_EVERY = 64  # files between two writes of the cache, so that an interrupted reading continues
TICK_NS = 2_000_000_000  # the coarsest clock of a filesystem, FAT's


def sha256_files(
    paths: Iterable[Path], cache: Path, *, again: bool = False, keep: bool = True, alone: bool = False
) -> dict[Path, str]:
    """The hashes of files. Files that are not in the cache are read in parallel and added to it.

    Args:
        again: read all files, also those in the cache.
        keep: whether to write the cache.
        alone: remove all other files from the cache, as files that do not exist any more.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    names = {file: _name(file, cache.parent) for file in paths}
    known = {} if again else _read_cache(cache)
    stamps = {file: _stamp(file) for file in names}
    kept = set(names.values()) if alone else set(known)
    new = {name: entry for name, entry in known.items() if name in kept}
    missing = [file for file, name in names.items() if name not in new or not new[name].is_of(stamps[file])]
    for number, (file, entry) in enumerate(_read(missing, stamps), start=1):
        new[names[file]] = entry
        if keep and number % KEEP_EVERY == 0:
            _write_cache(cache, new)
    if keep and new != known:
        _write_cache(cache, new)
    return {file: new[name].sha256 for file, name in names.items()}


def _name(file: Path, folder: Path) -> str:
    """The name of a file in the cache of a folder."""
    whole, within = file.absolute(), folder.absolute()
    return str(whole.relative_to(within) if whole.is_relative_to(within) else whole)


@dataclass(frozen=True)
class _Entry:
    """A file in the cache: its stamp, the time of reading in nanoseconds of Unix time, and its SHA-256."""

    stamp: list[int]
    read: int
    sha256: str

    def is_of(self, stamp: list[int]) -> bool:
        """Whether the file, which has this stamp now, still has the content that was read."""
        return self.stamp == stamp and stamp[2] + TICK_NS < self.read <= time.time_ns()


def _read_cache(cache: Path) -> dict[str, _Entry]:
    """The entries; none where the cache is missing, damaged or of an older version, which only costs time."""
    try:
        return read_json(cache, dict[str, _Entry])
    except (ArtifactError, OSError):
        return {}


def _write_cache(cache: Path, entries: dict[str, _Entry]) -> None:
    # A reader of a run folder may have no permission to write. A cache that a power loss cuts is read as an empty one.
    with contextlib.suppress(OSError), atomic_path(cache, durable=False) as temporary:
        temporary.write_text(json_text({name: asdict(entry) for name, entry in entries.items()}), encoding="utf-8")


def _read(files: list[Path], stamps: dict[Path, list[int]]) -> Iterator[tuple[Path, _Entry]]:
    """Each file with its entry. Stamp and time are from before the file is read."""
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as pool:
        try:
            for file, (now, digest) in zip(files, pool.map(_sha256, files), strict=True):
                yield file, _Entry(stamps[file], now, digest)
        finally:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for files that are not begun


def _sha256(file: Path) -> tuple[int, str]:
    try:
        return time.time_ns(), sha256_file(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def _stamp(file: Path) -> list[int]:
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
