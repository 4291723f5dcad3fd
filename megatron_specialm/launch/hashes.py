"""What a page's files are, as SHA-256 of their content: read once, and again only where a file may have changed.

    <root>/file_hashes.json   per file: its size, times and inode, when it was read, and its SHA-256

What counts is the content and the order of files, not their names: `./a.jsonl` is `a.jsonl`, and a glob is the list of what is
behind it. Of a folder (a tokenizer's, an encoder's) the names in it count, of a text file how it is read: as lines, rows or a
whole. What has no file here (`hf:`, a hub's model) is known by its name, what an installed package carries by its version.

The cache believes a file whose size, times and inode are as they were. Times of modification can be set at will, those of
change (ctime) cannot; but they stand still for as long as the filesystem's clock ticks, so a file that was changed shortly
before it was read may have been changed after it too, unseen, and is read again (as Git does with its index); so is what was
read at a time that is yet to come, by a clock that has been set back since. The device is not asked: a network filesystem has
another number on each node. Hashing waits for the disk and frees the interpreter's lock, so several files are read at a time.
"""

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from megatron_specialm.base.errors import ArtifactError, DataError, MissingTextError
from megatron_specialm.base.files import read_json, sha256_file, sha256_json, write_json
from megatron_specialm.config.graph import ENCODING_MODEL, TOKENIZER, Task, TaskId
from megatron_specialm.config.text import Text
from megatron_specialm.data.documents import HUB, cut_in_shards, resolve_files, text_format

CACHE = "file_hashes.json"
THREADS = 16  # at most: more readers than that do not make a filesystem faster
KEEP_EVERY = 64  # files after which the hashes so far are kept, so that an interrupted reading goes on where it was
TICK_NS = 2_000_000_000  # the coarsest clock of a filesystem, FAT's
PACKAGE = "package:"


class Part(NamedTuple):
    """A file, and what beside its bytes decides how it is read; no file where a name says all."""

    label: str
    file: Path | None


def hash_files(tasks: Iterable[Task], root: Path) -> dict[TaskId, dict[str, str]]:
    """SHA-256 of all that each task reads, by role.

    Raises:
        DataError: a file that a task needs is missing or cannot be read, or a set has more shards than files.
    """
    parts = look_up(tasks)
    files = dict.fromkeys(
        part.file for roles in parts.values() for found in roles.values() for part in found if part.file
    )
    hashes = _hashes(list(files), root / CACHE)
    return {
        name: {
            role: sha256_json([[part.label, hashes[part.file] if part.file else ""] for part in found])
            for role, found in roles.items()
        }
        for name, roles in parts.items()
    }


def look_up(tasks: Iterable[Task]) -> dict[TaskId, dict[str, list[Part]]]:
    """What stands behind the entries of each task and role. A set is looked up once: a thousand files for each of hundreds of
    shards takes a shared filesystem its time.

    Raises:
        DataError: a file that a task needs is missing, or a set has more shards than files.
    """
    known: dict[tuple[tuple[str, ...], int], list[list[Part]]] = {}

    def behind(task: Task, role: str) -> list[Part]:
        entries = task.files[role]
        if role in (TOKENIZER, ENCODING_MODEL):
            return [part for entry in entries for part in _model_parts(entry, role)]
        key = entries, task.shard.shards if task.shard else 1
        if key not in known:
            cut = cut_in_shards(*key) if task.shard else [resolve_files(entries)]
            known[key] = [[part for file in files for part in _text_parts(file)] for files in cut]
        return known[key][task.shard.number if task.shard else 0]

    return {task.id: {role: behind(task, role) for role in task.files} for task in tasks}


def _text_parts(file: Path | str) -> list[Part]:
    if isinstance(file, Path):
        return [Part(text_format(file), file)]
    name, _, split = file.removeprefix(HUB).partition(":")
    files = _files_in(Path(name))  # of two things of that name, the hub's library takes the folder
    return [Part(f"{HUB}:{split}", None), *files] if files else [Part(file, None)]


def _model_parts(entry: str, role: str) -> list[Part]:
    if entry.startswith(PACKAGE):
        return [Part(f"{entry} {_installed_version(entry.removeprefix(PACKAGE))}", None)]
    if files := _files_in(Path(entry)):
        return files
    if role == TOKENIZER:
        return [Part("", Path(file)) for file in resolve_files([entry])]
    return [Part(entry, None)]


def _installed_version(package: str) -> str:
    """Nothing where it is missing: the task itself says so."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        return importlib.metadata.version(package)
    return ""


def _files_in(folder: Path) -> list[Part]:
    """All files of a folder, by their names in it; none where it is no folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [Part(path.relative_to(folder).as_posix(), path) for path in files]


# --- the cache --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming_what_makes(text: Text) -> Iterator[None]:
    """Say with a missing file which command makes it, where the page knows."""
    try:
        yield
    except MissingTextError as error:
        if text.made_by is None:
            raise
        raise MissingTextError(f"{error}, or make this page's text: {text.made_by}") from None


def _hashes(files: list[Path], cache: Path) -> dict[Path, str]:
    """The files' hashes, those that are not in the cache read in parallel."""
    known = _read_cache(cache)
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
    return entry is not None and entry["stamp"] == stamp and stamp[2] + TICK_NS < entry["read"] <= time.time_ns()


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
