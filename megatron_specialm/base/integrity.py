"""Whether the files of a finished artifact are unchanged.

Sizes are compared wherever a task's state is needed. Hashes are compared when a task first reads an input, and again only where
a file may have changed by its times (`base/hash_cache.py`); `specialm verify --deep` reads every byte.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePath

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import MANIFEST, REMAKE, ManifestEntry, listed_files, seal_file
from megatron_specialm.base.hash_cache import sha256_files

# Records of a training, for display and for its resumption: a fenced attempt on a node that was cut off may append to them
# after another one has finished the task. No other stage reads them.
RECORDS = ("metrics.jsonl", "work.json")
PROFILES = "profile"  # a folder of the same kind: a training's traces and memory snapshots
CHECKED = "checked.json"  # the cache of hashes, in an artifact's folder
LEFT_OVER = re.compile(r"\..*\.tmp")  # of killed writers


def list_files(folder: Path, *, without: Collection[str] = ()) -> dict[str, ManifestEntry]:
    """Size and SHA-256 of every file below a folder, by its relative path, flushed to the disk. Files that a published folder's
    manifest lists are not read again.

    Args:
        without: names of files in the folder itself to leave out.

    Raises:
        ArtifactError: a file that a manifest lists is missing or of another size.
    """
    names, entries = present_files(folder, without=without), dict[str, ManifestEntry]()
    for manifest in (folder / name for name in names if PurePath(name).name == MANIFEST):
        listed = listed_files(manifest.parent)
        if damage := find_damage(manifest.parent, listed):
            raise ArtifactError(f"{damage}: {REMAKE}")
        inside = manifest.parent.relative_to(folder)
        entries |= {(inside / name).as_posix(): entry for name, entry in listed.items()}
    return {name: entries.get(name) or seal_file(folder / name) for name in names}


def present_files(folder: Path, *, without: Collection[str] = ()) -> list[str]:
    """The relative paths of the files below a folder, except `without`, training records, and what killed writers have left."""
    names = (path.relative_to(folder) for path in _files(folder) if PROFILES not in path.relative_to(folder).parts[:-1])
    return sorted(
        name.as_posix() for name in names if str(name) not in without and name.name not in (CHECKED, *RECORDS)
    )


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if LEFT_OVER.fullmatch(path.name) or path.is_symlink():
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def find_damage(folder: Path, files: Mapping[str, ManifestEntry]) -> str | None:
    """A message about the first file that is missing or has another size; None where there is none."""
    for name, entry in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path}: {error.strerror}, though the task that made it has finished"
        if size != entry.bytes:
            return f"{path}: {size} bytes, and {entry.bytes} when it was made: the file was cut or grew"
    return None


def check_files(
    folder: Path, files: Mapping[str, ManifestEntry], *, again: bool = False, original: Path | None = None
) -> None:
    """Compare files with their sizes and hashes; files that have not changed since the last comparison are not read.

    Args:
        again: read them nevertheless.
        original: the folder from which this one was copied, for the message.

    Raises:
        ArtifactError: with the first file that is missing, of another size, or changed.
    """
    if damage := find_damage(folder, files):
        raise ArtifactError(damage)
    hashes = sha256_files((folder / name for name in files), folder / CHECKED, again=again, alone=True)
    place = original or folder
    for name, entry in files.items():
        if hashes[folder / name] != entry.sha256:
            raise ArtifactError(
                f"{place / name}: SHA-256 is not what it was when it was made: its bytes have changed: put it back from a "
                f"copy, or remove {place}/done.json and run again"
            )
