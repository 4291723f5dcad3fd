"""SHA-256 of files that may be large and many: read once, and again only where a file may have changed.

    <cache>.json   per file: its size, times and inode, when it was read, and its SHA-256. Files below the cache's folder stand
                   there by their names in it, so that a folder that is moved or shown by a link keeps its cache.

The cache believes a file whose size, times and inode are as they were. Times of modification can be set at will, those of
change (ctime) cannot; but they stand still for as long as the filesystem's clock ticks, so a file that was changed shortly
before it was read may have been changed after it too, unseen, and is read again (as Git does with its index); so is what was
read at a time that is yet to come, by a clock that has been set back since. The device is not asked: a network filesystem has
another number on each node. Hashing waits for the disk and frees the interpreter's lock, so several files are read at a time.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import atomic_path, json_text, read_json, sha256_file

THREADS = 16  # at most: more readers than that do not make a filesystem faster
KEEP_EVERY = 64  # files after which the hashes so far are kept, so that an interrupted reading goes on where it was
TICK_NS = 2_000_000_000  # the coarsest clock of a filesystem, FAT's


def sha256_files(
    paths: Iterable[Path], cache: Path, *, again: bool = False, keep: bool = True, alone: bool = False
) -> dict[Path, str]:
    """The files' hashes, those that are not in the cache read in parallel; the cache then holds these too.

    Args:
        again: read all, whatever the cache knows.
        keep: False for who writes nothing, the cache neither.
        alone: let the cache hold these files and no others: those of the folder that are gone.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    names = {file: _name(file, cache.parent) for file in paths}
    known = {} if again else _read_cache(cache)
    stamps = {file: _stamp(file) for file in names}
    kept = set(names.values()) if alone else set(known)
    new = {name: entry for name, entry in known.items() if name in kept}
    missing = [file for file, name in names.items() if not _is_current(new.get(name), stamps[file])]
    for number, (file, entry) in enumerate(_read(missing, stamps), start=1):
        new[names[file]] = entry
        if keep and number % KEEP_EVERY == 0:
            _write_cache(cache, new)
    if keep and new != known:
        _write_cache(cache, new)
    return {file: new[name]["sha256"] for file, name in names.items()}


def _name(file: Path, folder: Path) -> str:
    """Its name in the cache of a folder, from wherever it is looked at."""
    whole, within = file.absolute(), folder.absolute()
    return str(whole.relative_to(within) if whole.is_relative_to(within) else whole)


def _is_current(entry: Any, stamp: list[int]) -> bool:
    """Whether a file has still the content that it had when it was read."""
    return entry is not None and entry["stamp"] == stamp and stamp[2] + TICK_NS < entry["read"] <= time.time_ns()


@dataclass(frozen=True)
class _Entry:
    """A file of the cache: its stamp, when it was read, in nanoseconds of Unix time, and its SHA-256."""

    stamp: list[int]
    read: int
    sha256: str


def _read_cache(cache: Path) -> dict[str, Any]:
    """What is in it; nothing where it is missing, damaged or of an older version, since its loss costs time only."""
    try:
        return {name: asdict(entry) for name, entry in read_json(cache, dict[str, _Entry]).items()}
    except (ArtifactError, OSError):
        return {}


def _write_cache(cache: Path, entries: dict[str, Any]) -> None:
    # A reader of a run need not be able to write there; and a cache that a power loss tears is read as an empty one.
    with contextlib.suppress(OSError), atomic_path(cache, durable=False) as temporary:
        temporary.write_text(json_text(entries), encoding="utf-8")


def _read(files: list[Path], stamps: dict[Path, list[int]]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each file with its entry. Its stamp was taken, and its time is, before it is read."""
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as pool:
        try:
            for file, (now, digest) in zip(files, pool.map(_sha256, files), strict=True):
                yield file, {"stamp": stamps[file], "read": now, "sha256": digest}
        finally:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for what has not begun


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
