"""SHA-256 of files that may be large and many: read once, and again only where a file may have changed.

    <cache>.json   per file: its size, times and inode, when it was read, and its SHA-256

The cache believes a file whose size, times and inode are as they were. Times of modification can be set at will, those of
change (ctime) cannot; but they stand still for as long as the filesystem's clock ticks, so a file that was changed shortly
before it was read may have been changed after it too, unseen, and is read again (as Git does with its index). The device is
not asked: a network filesystem has another number on each node. Hashing waits for the disk and frees the interpreter's lock,
so several files are read at a time.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError, DataError
from megatron_specialm.base.files import read_json, sha256_file, write_json

THREADS = 16  # at most: more readers than that do not make a filesystem faster
KEEP_EVERY = 64  # files after which the hashes so far are kept, so that an interrupted reading goes on where it was
TICK_NS = 2_000_000_000  # the coarsest clock of a filesystem, FAT's


def sha256_files(paths: Iterable[Path], cache: Path, *, again: bool = False) -> dict[Path, str]:
    """The files' hashes, those that are not in the cache read in parallel; the cache then holds these files.

    Args:
        again: read all, whatever the cache knows.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    files = list(paths)
    known = {} if again else _read_cache(cache)
    stamps = {file: _stamp(file) for file in files}
    new = {name: known[name] for file in files if (name := _name(file)) in known}
    missing = [file for file in files if not _is_current(new.get(_name(file)), stamps[file])]
    for number, (file, entry) in enumerate(_read(missing, stamps), start=1):
        new[_name(file)] = entry
        if number % KEEP_EVERY == 0:
            _write_cache(cache, new)
    if new != known:
        _write_cache(cache, new)
    return {file: new[_name(file)]["sha256"] for file in files}


def _name(file: Path) -> str:
    """Its name in the cache, from wherever it is looked at."""
    return str(file.absolute())


def _is_current(entry: Any, stamp: list[int]) -> bool:
    """Whether a file has still the content that it had when it was read."""
    return entry is not None and entry["stamp"] == stamp and stamp[2] + TICK_NS < entry["read"]


def _read_cache(cache: Path) -> dict[str, Any]:
    """What is in it; nothing where it is missing, damaged or of an older version, since its loss costs time only."""
    try:
        entries = read_json(cache)
        wanted = {"stamp", "read", "sha256"}
        return {name: entry for name, entry in entries.items() if entry.keys() == wanted}
    except (ArtifactError, OSError, AttributeError):
        return {}


def _write_cache(cache: Path, entries: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who looks at a run need not be able to write there
        write_json(cache, entries)


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
