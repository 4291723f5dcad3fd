"""Files that are written atomically and checked when they are read.

A file is written under a temporary name, fsynced and renamed. A folder is published in the same way, with a manifest of sizes
and SHA-256 sums that `verify_folder` checks. Every error of a file that is read is an `ArtifactError` (`reading`).
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar, overload

from megatron_specialm.base.errors import ArtifactError, SpecialmError

MANIFEST = "manifest.json"
REMAKE = "remove the folder that it stands in and run the same command again"
Shape = TypeVar("Shape")


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Add this file's name to an error of the operating system without one, as that of a full disk is."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is fsynced and renamed to `path`. An error without a
    file's name gets this one's.

    Args:
        durable: False for a file that may be lost or torn by a power loss; it is not fsynced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with named(path):
            yield temporary
            if durable:
                fsync_path(temporary)
            os.replace(temporary, path)
            if durable:
                fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A temporary name in a file's folder, which `remove_leftovers` recognises."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed attempts have left in a task's folder, by the names of `_temporary`. No other
    process may be writing there."""
    for path in folder.rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def give_usual_mode(*files: Path) -> None:
    """Give files the mode of a new file in their folder, by the umask or the folder's default access list. Some libraries, as
    safetensors, write files that only the owner can read."""
    for path in files:
        probe = _temporary(path)
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        path.chmod(mode)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file atomically and durably.

    Args:
        private: readable by the owner only, whatever the umask, from its creation on: it may hold a secret.
    """
    with atomic_path(path) as temporary:
        if private:
            temporary.unlink(missing_ok=True)
            os.fchmod(descriptor := os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 0o600)
            os.close(descriptor)
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically and durably. NaN is refused, because only Python's reader accepts it."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text that `write_json` writes; equal values give equal bytes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


@contextlib.contextmanager
def reading(path: Path, *, form: str, remedy: str = REMAKE) -> Iterator[None]:
    """Raise any error of reading a file as an `ArtifactError` with the file, the reason and what to do.

    Args:
        form: the expected form, as "valid JSON".

    Raises:
        ArtifactError: the file is missing or cannot be read, or the library that reads it raises anything.
        PermissionError: unchanged, since the file is not damaged.
    """
    try:
        yield
    except (SpecialmError, PermissionError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path}: no such file: {remedy}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}): {remedy}") from None
    except Exception as error:  # libraries raise any type for a damaged file
        raise ArtifactError(f"{path}: not {form} ({error or type(error).__name__}): {remedy}") from None


@overload
def read_json(path: Path, *, remedy: str = REMAKE) -> Any: ...
@overload
def read_json(path: Path, shape: type[Shape], *, remedy: str = REMAKE) -> Shape: ...
def read_json(path: Path, shape: Any = Any, *, remedy: str = REMAKE) -> Any:
    """Read a JSON file.

    Args:
        shape: the type of its content: of dictionaries, lists, tuples and simple values, or a dataclass, whose types may
            have limits by pydantic's `Field`. Fields that a dataclass does not have are ignored.
        remedy: what to do if it is damaged.

    Raises:
        ArtifactError: the file is missing, empty, not JSON, or of another shape.
    """
    with reading(path, form="valid JSON", remedy=remedy):
        content = path.read_bytes()
    return parse_json(content, shape, path=path, remedy=remedy)


def parse_json(content: bytes, shape: type[Shape], *, path: Path, remedy: str = REMAKE) -> Shape:
    """As `read_json`, for the content of a file or a part of it, such as a line. Values are not converted.

    Raises:
        ArtifactError: it is not JSON, or of another shape.
    """
    with reading(path, form="valid JSON", remedy=remedy):
        text = content.decode()
        if not text.strip("\0\n "):
            raise ValueError("it is empty")
        value: Any = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    if shape is Any:
        return value
    from pydantic import ValidationError  # not before it is needed: `specialm --help` takes no second

    try:
        return _adapter(shape).validate_json(text, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        found = "" if first["type"] == "missing" else f", and is {first['input']!r:.60}"
        raise ArtifactError(f"{path}: {place}: {first['msg']}{found}: {remedy}") from None


@functools.cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits:.20} is no number that can be computed with")
    return value


def read_regular(path: Path, *, most_bytes: int) -> bytes:
    """The content of a regular file that a user names, or of a link to one. A pipe would block, a device has no end, and
    a file of gigabytes is none of those that are read whole.

    Raises:
        OSError: it is missing, cannot be read, is not a regular file, or is larger than that.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer is opened at once
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file, but a folder, a pipe or a device", str(path))
    with os.fdopen(descriptor, "rb") as file:
        content = b"" if status.st_size > most_bytes else file.read(most_bytes + 1)
    if max(status.st_size, len(content)) > most_bytes:
        raise OSError(errno.EFBIG, f"more than {most_bytes:,} bytes, which no such file has", str(path))
    return content


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _folder_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


@dataclass(frozen=True)
class ManifestEntry:
    """Size and SHA-256 of a file in a manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest: the files of its folder, by their relative paths."""

    files: dict[str, ManifestEntry]


def seal_file(path: Path) -> ManifestEntry:
    """Flush a file to the disk and take its size and SHA-256."""
    fsync_path(path)
    return ManifestEntry(path.stat().st_size, sha256_file(path))


def publish_folder(temporary: Path, final: Path, *, sealed: Mapping[str, ManifestEntry] | None = None) -> None:
    """Hash and fsync every file of a folder, write the manifest last, and rename the folder to its final name.

    Args:
        sealed: the entries, by name, of files whose writers have hashed and fsynced them already.
    """
    seal_folder(temporary, sealed=sealed)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    fsync_path(final.parent)


def seal_folder(folder: Path, *, sealed: Mapping[str, ManifestEntry] | None = None) -> None:
    """Hash and fsync every file of a folder, and write the manifest; see `publish_folder`."""
    entries = dict(sealed or {})
    for path in _folder_files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in entries:
            entries[name] = seal_file(path)
    write_json(folder / MANIFEST, asdict(Manifest(entries)))


def link_folder(folder: Path, aside: Path) -> None:
    """Make `aside` a copy of a published folder, with the manifest and the files that it lists: by hard links where the
    filesystem has them, because published files are never written to."""
    for name in (*listed_files(folder), MANIFEST):
        path, copy = folder / name, aside / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # another filesystem, or one without links
            shutil.copyfile(path, copy)
            fsync_path(copy)


def listed_files(folder: Path, *, remedy: str = REMAKE) -> dict[str, ManifestEntry]:
    """The files of a published folder by their names. Readers open these files only. `remedy` says what to do if the manifest
    is damaged.

    Raises:
        ArtifactError: there is no manifest, it lists no files, or it names a file outside of the folder.
    """
    files = read_json(folder / MANIFEST, Manifest, remedy=remedy).files
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.as_posix() in (".", MANIFEST):
            raise ArtifactError(f"{folder / MANIFEST}: lists {name!r}, which is no file of its folder: {remedy}")
    if not files:
        raise ArtifactError(f"{folder / MANIFEST}: lists no files: {remedy}")
    return files


def unlisted_files(folder: Path) -> list[Path]:
    """The files of a published folder that its manifest does not list. Hidden files do not count: filesystems and version
    control leave such."""
    listed = listed_files(folder)
    names = ((path, path.relative_to(folder)) for path in _folder_files(folder))
    return [path for path, name in names if name.as_posix() not in listed and not any(p[0] == "." for p in name.parts)]


def verify_folder(folder: Path, *, alone: bool = False, remedy: str = REMAKE) -> None:
    """Check a published folder against its manifest.

    Args:
        alone: whether other files are an error, too: for folders where a library chooses what it reads.
        remedy: what to do if it is damaged.

    Raises:
        ArtifactError: with the first file that is missing, of another size, changed, or not listed.
    """
    for name, entry in listed_files(folder, remedy=remedy).items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, though {MANIFEST} lists it: {remedy}")
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(
                f"{path}: {size} bytes, {MANIFEST} says {entry.bytes}: the file was cut or grew: {remedy}"
            )
        if sha256_file(path) != entry.sha256:
            raise ArtifactError(f"{path}: SHA-256 differs from {MANIFEST}: its bytes have changed: {remedy}")
    if alone and (found := unlisted_files(folder)):
        raise ArtifactError(f"{found[0]}: {MANIFEST} does not list it, and it might be read all the same: remove it")
