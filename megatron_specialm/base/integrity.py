"""Whether the files of a finished artifact are those that it was finished with.

Sizes are looked at wherever it is asked whether a task is done. Hashes are compared when a task first reads an input, and
again only where a file's times say that it may have changed (`base/hash_cache.py`); `specialm verify --deep` reads every byte.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePath

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import MANIFEST, REMAKE, ManifestEntry, listed_files, seal_file
from megatron_specialm.base.hash_cache import sha256_files

# What a training notes as it goes, for people and for its own resumption: an attempt that was cut off, and is fenced, may go
# on writing there after another one has finished the task. Nothing else reads it.
RECORDS = ("metrics.jsonl", "work.json")
PROFILES = "profile"  # a folder of the same kind: a training's traces and memory snapshots
CHECKED = "checked.json"  # the cache of hashes, in an artifact's folder
LEFT_OVER = re.compile(r"\..*\.tmp")  # of killed writers


def list_files(folder: Path, *, without: Collection[str] = ()) -> dict[str, ManifestEntry]:
    """Size and SHA-256 of every file below a folder, by its name there, flushed to the disk. Files that a published folder's
    manifest lists are not read again.

    Args:
        without: names of files right in the folder that are left out.

    Raises:
        ArtifactError: a manifest lists a file that is not there, or is of another size.
    """
    names, seals = present_files(folder, without=without), dict[str, ManifestEntry]()
    for manifest in (folder / name for name in names if PurePath(name).name == MANIFEST):
        listed = listed_files(manifest.parent)
        if damage := find_damage(manifest.parent, listed):
            raise ArtifactError(f"{damage}: {REMAKE}")
        inside = manifest.parent.relative_to(folder)
        seals |= {(inside / name).as_posix(): seal for name, seal in listed.items()}
    return {name: seals.get(name) or seal_file(folder / name) for name in names}


def present_files(folder: Path, *, without: Collection[str] = ()) -> list[str]:
    """The names below a folder of its files, less those that `without` names and what killed writers have left."""
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
    """What is wrong with the first file that is missing or has another size; None where all are there."""
    for name, seal in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path}: {error.strerror}, though the task that made it has finished"
        if size != seal.bytes:
            return f"{path}: {size} bytes, and {seal.bytes} when it was made: the file was cut or grew"
    return None


def check_files(
    folder: Path, files: Mapping[str, ManifestEntry], *, again: bool = False, original: Path | None = None
) -> None:
    """Compare files with what they were; those that were compared before, and have not been touched since, are not read.

    Args:
        again: read them nevertheless.
        original: the folder that this one was copied from, where changed bytes are to be mended.

    Raises:
        ArtifactError: naming the first file that is missing, cut short, or whose bytes have changed.
    """
    if damage := find_damage(folder, files):
        raise ArtifactError(damage)
    hashes = sha256_files((folder / name for name in files), folder / CHECKED, again=again, alone=True)
    place = original or folder
    for name, seal in files.items():
        if hashes[folder / name] != seal.sha256:
            raise ArtifactError(
                f"{place / name}: SHA-256 is not what it was when it was made: its bytes have changed: put it back from a "
                f"copy, or remove {place}/done.json and run again"
            )
