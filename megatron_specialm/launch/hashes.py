"""What the text of a page is, as SHA-256: read once, and again only where a file's size or time has changed.

    <root>/file_hashes.json   per file: its size, time and SHA-256

Hashing waits for the disk and frees the interpreter's lock, so several files are read at a time.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import DataError
from megatron_specialm.base.files import read_json, sha256_file, write_json
from megatron_specialm.config.graph import Task
from megatron_specialm.data.documents import cut_in_shards, hash_content, hash_files, hashed_files

CACHE = "file_hashes.json"
THREADS = 16  # at most: more readers than that do not make a filesystem faster
KEEP_EVERY = 64  # files after which the hashes so far are kept, so that an interrupted reading goes on where it was


def hash_texts(tasks: Iterable[Task], root: Path) -> dict[str, str]:
    """SHA-256 of all that the tasks read, by the names of `Task.contents`.

    Raises:
        DataError: text that a task needs is missing or cannot be read, or a set has more shards than files.
    """
    tasks = list(tasks)
    entries = list(dict.fromkeys(entry for task in tasks for entry in task.files))
    in_shards = [(task, task.shard) for task in tasks if task.shard and task.files]
    # Once per set: to look up a thousand files for each of hundreds of shards takes a shared filesystem its time.
    cuts = {key: cut_in_shards(*key) for key in dict.fromkeys((task.files, shard.shards) for task, shard in in_shards)}
    ranges = {task.contents[0]: cuts[task.files, shard.shards][shard.number] for task, shard in in_shards}
    files = dict.fromkeys(file for entry in entries for file in hashed_files(entry) if isinstance(file, Path))
    hashes = _hashes(list(files), root / CACHE)
    whole = {entry: hash_content(entry, hashes) for entry in entries}
    return whole | {name: hash_files(parts, hashes) for name, parts in ranges.items()}


def _hashes(files: list[Path], cache: Path) -> dict[Path, str]:
    """The files' hashes, those that are not in the cache read in parallel."""
    known: dict[str, Any] = read_json(cache) if cache.exists() else {}
    stamps = {file: _stamp(file) for file in files}
    new = {str(file): known[str(file)] for file in files if known.get(str(file), {}).get("stamp") == stamps[file]}
    missing = [file for file in files if str(file) not in new]
    for number, (file, digest) in enumerate(_read(missing), start=1):
        new[str(file)] = {"stamp": stamps[file], "sha256": digest}
        if number % KEEP_EVERY == 0:
            _write_cache(cache, new)
    if new != known:
        _write_cache(cache, new)
    return {file: new[str(file)]["sha256"] for file in files}


def _write_cache(cache: Path, entries: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who looks at a run need not be able to write there
        write_json(cache, entries)


def _read(files: list[Path]) -> Iterator[tuple[Path, str]]:
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as pool:
        try:
            yield from zip(files, pool.map(_sha256, files), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for what has not begun


def _sha256(file: Path) -> str:
    try:
        return sha256_file(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]
