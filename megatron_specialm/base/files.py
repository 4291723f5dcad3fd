"""Files that are either whole or absent.

Everything a later reader relies on goes through here: written beside its final name, fsynced, then renamed. A folder is
published the same way, with a manifest of sizes and SHA-256 sums that `verify_folder` checks.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from megatron_specialm.base.errors import ArtifactError

MANIFEST = "manifest.json"


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is fsynced and takes the place of `path`. An error that comes
    without a file's name, as that of a full disk does, gets this one's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def give_usual_mode(*files: Path) -> None:
    """Give files the mode that any new file gets where they stand, by the umask or the folder's default access list: some
    libraries, as safetensors, write theirs for the owner alone."""
    for path in files:
        probe = path.with_name(f".{path.name}.{os.getpid()}.mode")
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and durably."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically and durably. NaN is refused: no reader but Python's would take it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); it is damaged, remove it and run again") from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _folder_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


class FileSeal(TypedDict):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def seal_file(path: Path) -> FileSeal:
    """Flush a file to the disk and take its size and SHA-256."""
    fsync_path(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def publish_folder(temporary: Path, final: Path, *, sealed: Mapping[str, FileSeal] | None = None) -> None:
    """Seal a folder and give it its final name: every file hashed and fsynced, the manifest last, then one rename.

    Args:
        sealed: the seals, by name, of files whose writers have sealed them already.
    """
    entries = dict(sealed or {})
    for path in _folder_files(temporary):
        name = path.relative_to(temporary).as_posix()
        if name not in entries:
            entries[name] = seal_file(path)
    write_json(temporary / MANIFEST, {"files": entries})
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    fsync_path(final.parent)


def link_folder(folder: Path, aside: Path) -> None:
    """Make `aside` a copy of a published folder, manifest included: by hard links where the filesystem can, as published
    files are never written to."""
    for path in (*_folder_files(folder), folder / MANIFEST):
        copy = aside / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # another filesystem, or one without links
            shutil.copyfile(path, copy)
            fsync_path(copy)


def verify_folder(folder: Path) -> None:
    """Check a published folder against its manifest.

    Raises:
        ArtifactError: naming the first file that is missing, cut short, or whose bytes have changed.
    """
    manifest = read_json(folder / MANIFEST)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, though {MANIFEST} lists it")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ArtifactError(f"{path}: {size} bytes, {MANIFEST} says {entry['bytes']}: the file was cut or grew")
        if sha256_file(path) != entry["sha256"]:
            raise ArtifactError(f"{path}: SHA-256 differs from {MANIFEST}: its bytes have changed")
