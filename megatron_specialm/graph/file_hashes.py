"""SHA-256 of the files that tasks read.

    <root>/file_hashes.json   the cache of `base/hash_cache.py`

A hash covers the content and the order of files, not their paths: `./a.jsonl` is `a.jsonl`, and a glob is the list of files
that it matches. For a folder (of a tokenizer, an encoder or a checkpoint) it covers the names in it too, for a text file how it
is read: as lines, rows or a whole. What is not a file here (`hf:`, a model on a hub) is identified by its name (and revision),
a package's data by its version.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from megatron_specialm.base.errors import ConfigError, MissingTextError
from megatron_specialm.base.files import sha256_json
from megatron_specialm.base.hash_cache import sha256_files
from megatron_specialm.base.hub import is_hub_name
from megatron_specialm.base.packages import installed_version
from megatron_specialm.config.text import Text
from megatron_specialm.data.documents import HUB, cut_in_shards, resolve_files, text_format
from megatron_specialm.graph.tasks import CHECKPOINT, ENCODING_MODEL, MODELS, Task, TaskId

CACHE = "file_hashes.json"
PACKAGE = "package:"


class Part(NamedTuple):
    """A file, with a label of what else decides how it is read; or only a label, where there is no file."""

    label: str
    file: Path | None


def hash_files(tasks: Iterable[Task], root: Path, *, keep: bool = True) -> dict[TaskId, dict[str, str]]:
    """SHA-256 of the files that each task reads, by role.

    Args:
        keep: whether the run folder's cache is written.

    Raises:
        ConfigError: a glob or folder has files of the run folder.
        DataError: a file that a task needs is missing or cannot be read, or a set has more shards than files.
    """
    parts = find_parts(tasks, root)
    files = dict.fromkeys(
        part.file for roles in parts.values() for found in roles.values() for part in found if part.file
    )
    hashes = sha256_files(files, root / CACHE, keep=keep)
    return {
        name: {
            role: sha256_json([[part.label, hashes[part.file] if part.file else ""] for part in found])
            for role, found in roles.items()
        }
        for name, roles in parts.items()
    }


def find_parts(tasks: Iterable[Task], root: Path) -> dict[TaskId, dict[str, list[Part]]]:
    """The files that the entries of each task and role name. Each set is searched once, as a search of a thousand files for
    each of hundreds of shards is slow on a shared filesystem.

    Raises:
        ConfigError: a glob or a folder has files of the run folder: what the run writes would make its own work stale.
        DataError: a file that a task needs is missing, or a set has more shards than files.
    """
    known: dict[tuple[tuple[str, ...], int], list[list[Part]]] = {}

    def behind(task: Task, role: str) -> list[Part]:
        entries = task.files[role]
        if role in MODELS:
            parts = [part for entry in entries for part in _model_parts(entry, role)]
            _refuse_own(parts, entries, root)
            return parts
        key = entries, task.shard.shards if task.shard else 1
        if key not in known:
            cut = cut_in_shards(*key) if task.shard else [resolve_files(entries)]
            known[key] = [[part for file in files for part in _text_parts(file)] for files in cut]
            _refuse_own(chain.from_iterable(known[key]), entries, root)
        return known[key][task.shard.number if task.shard else 0]

    return {task.id: {role: behind(task, role) for role in task.files} for task in tasks}


def _refuse_own(parts: Iterable[Part], entries: Sequence[str], root: Path) -> None:
    """Refuse files of the run folder that a glob or folder finds. A file that an entry names itself is allowed."""
    named = {Path(entry) for entry in entries}
    found = {part.file.parent: part.file for part in parts if part.file is not None and part.file not in named}
    for folder, file in found.items():
        if folder.resolve().is_relative_to(root.resolve()):
            finds = (entry for entry in entries if Path(entry) in file.parents or file in resolve_files([entry]))
            raise ConfigError(
                f"{next(finds, ', '.join(entries))}: finds {file}, which is in the run folder {root}: what a run writes there "
                "would make what it has done stale: let the entry find files outside, or choose another root"
            )


def _text_parts(file: Path | str) -> list[Part]:
    if isinstance(file, Path):
        return [Part(text_format(file), file)]
    name, _, split = file.removeprefix(HUB).partition(":")
    files = _files_in(Path(name))  # the hub's library prefers a folder of that name
    return [Part(f"{HUB}:{split}", None), *files] if files else [Part(file, None)]


def _model_parts(entry: str, role: str) -> list[Part]:
    if entry.startswith(PACKAGE):
        version = installed_version(entry.removeprefix(PACKAGE)) or ""  # where it is missing, the task reports that
        return [Part(f"{entry} {version}", None)]
    if files := _files_in(Path(entry)):
        return files
    is_checkpoint_on_hub = role == CHECKPOINT and not Path(entry).exists() and is_hub_name(entry.partition("@")[0])
    if role == ENCODING_MODEL or is_checkpoint_on_hub:
        return [Part(entry, None)]
    return [Part("", Path(file)) for file in resolve_files([entry])]


def _files_in(folder: Path) -> list[Part]:
    """All files of a folder, by their relative paths; none where it is not a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [Part(path.relative_to(folder).as_posix(), path) for path in files]


@contextlib.contextmanager
def with_made_by_hint(text: Text) -> Iterator[None]:
    """Add the command that makes the text (`made_by`) to the error of a missing file."""
    try:
        yield
    except MissingTextError as error:
        if text.made_by is None:
            raise
        raise MissingTextError(f"{error}, or make this config's text: {text.made_by}") from None
