"""Files that are either whole or absent.

Everything a later reader relies on goes through here: written beside its final name, fsynced, then renamed. A folder is
published the same way, with a manifest of sizes and SHA-256 sums that `verify_folder` checks. Whatever is wrong with a file
that is read, the error is of one kind (`reading`).
"""

import contextlib
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
    """An error of the operating system that comes without a file's name, as that of a full disk does, gets this one's."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is fsynced and takes the place of `path`. An error that comes
    without a file's name gets this one's.

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
    """A name beside a file's own, by which `remove_leftovers` knows it for ours."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what attempts that were killed while they wrote have left in a task's folder: files with names as only
    `_temporary` makes them. No other process may be at work in there."""
    for path in folder.rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def give_usual_mode(*files: Path) -> None:
    """Give files the mode that any new file gets where they stand, by the umask or the folder's default access list: some
    libraries, as safetensors, write theirs for the owner alone."""
    for path in files:
        probe = _temporary(path)
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        path.chmod(mode)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Write a text file atomically and durably.

    Args:
        private: for the owner alone, whatever the umask, from its first moment on: it may hold a secret.
    """
    with atomic_path(path) as temporary:
        if private:
            temporary.unlink(missing_ok=True)
            os.fchmod(descriptor := os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 0o600)
            os.close(descriptor)
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically and durably. NaN is refused: no reader but Python's would take it."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes: the same value always as the same bytes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


@contextlib.contextmanager
def reading(path: Path, *, form: str, remedy: str = REMAKE) -> Iterator[None]:
    """Say what is wrong with a file that is read within: the file, the reason, and what to do. Of all files alike.

    Args:
        form: what it should be, as "valid JSON".

    Raises:
        ArtifactError: it is missing, cannot be read, or whatever a library raises that is asked to read it.
        PermissionError: as it comes, since the file is not to blame.
    """
    try:
        yield
    except (SpecialmError, PermissionError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{path}: no such file: {remedy}") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error}): {remedy}") from None
    except Exception as error:  # libraries raise what they like where a file is damaged
        raise ArtifactError(f"{path}: not {form} ({error or type(error).__name__}): {remedy}") from None


@overload
def read_json(path: Path, *, remedy: str = REMAKE) -> Any: ...
@overload
def read_json(path: Path, shape: type[Shape], *, remedy: str = REMAKE) -> Shape: ...
def read_json(path: Path, shape: Any = Any, *, remedy: str = REMAKE) -> Any:
    """Read a JSON file.

    Args:
        shape: the type of its content: of dictionaries, lists, tuples and simple values, or a dataclass, whose types may
            have limits as pydantic's `Field` gives them. What a dataclass does not name is passed over.
        remedy: what to do if it is damaged.

    Raises:
        ArtifactError: the file is missing, empty, no JSON, or of another shape.
    """
    with reading(path, form="valid JSON", remedy=remedy):
        text = path.read_bytes().decode()
        if not text.strip("\0\n "):
            raise ValueError("it is empty")
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    return value if shape is Any else _conform(text, shape, path, remedy)


def parse_json(line: bytes, shape: type[Shape], *, path: Path, remedy: str = REMAKE) -> Shape:
    """The same of a part of a file, as a line of it.

    Raises:
        ArtifactError: it is no JSON, or of another shape.
    """
    with reading(path, form="valid JSON", remedy=remedy):
        text = line.decode()
        json.loads(text, parse_constant=_no_number, parse_float=_finite)
    return _conform(text, shape, path, remedy)


def _conform(text: str, shape: type[Shape], path: Path, remedy: str) -> Shape:
    """JSON as an object of that type; values are of their types as they stand, and not converted."""
    from pydantic import ValidationError  # not before it is needed: `specialm --help` takes no second

    adapter: Any = _adapter(shape)  # type: ignore[arg-type]
    try:
        return adapter.validate_json(text, strict=True)
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
    """What the manifest says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest: the files of its folder by their names, which are paths from there."""

    files: dict[str, ManifestEntry]


def seal_file(path: Path) -> ManifestEntry:
    """Flush a file to the disk and take its size and SHA-256."""
    fsync_path(path)
    return ManifestEntry(path.stat().st_size, sha256_file(path))


def publish_folder(temporary: Path, final: Path, *, sealed: Mapping[str, ManifestEntry] | None = None) -> None:
    """Seal a folder and give it its final name: every file hashed and fsynced, the manifest last, then one rename.

    Args:
        sealed: the seals, by name, of files whose writers have sealed them already.
    """
    entries = dict(sealed or {})
    for path in _folder_files(temporary):
        name = path.relative_to(temporary).as_posix()
        if name not in entries:
            entries[name] = seal_file(path)
    write_json(temporary / MANIFEST, asdict(Manifest(entries)))
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    fsync_path(final.parent)


def link_folder(folder: Path, aside: Path) -> None:
    """Make `aside` a copy of a published folder, manifest included and nothing that it does not list: by hard links where the
    filesystem can, as published files are never written to."""
    for name in (*listed_files(folder), MANIFEST):
        path, copy = folder / name, aside / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # another filesystem, or one without links
            shutil.copyfile(path, copy)
            fsync_path(copy)


def listed_files(folder: Path) -> dict[str, ManifestEntry]:
    """The files of a published folder by their names: those, and no others, are to be read.

    Raises:
        ArtifactError: there is no manifest, it lists nothing, or it names a file outside of the folder.
    """
    files = read_json(folder / MANIFEST, Manifest).files
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.as_posix() in (".", MANIFEST):
            raise ArtifactError(f"{folder / MANIFEST}: lists {name!r}, which is no file of its folder: {REMAKE}")
    if not files:
        raise ArtifactError(f"{folder / MANIFEST}: lists no files: {REMAKE}")
    return files


def unlisted_files(folder: Path) -> list[Path]:
    """What stands in a published folder beside the files that its manifest lists. Hidden files are nobody's: filesystems and
    version control leave such."""
    listed = listed_files(folder)
    names = ((path, path.relative_to(folder)) for path in _folder_files(folder))
    return [path for path, name in names if name.as_posix() not in listed and not any(p[0] == "." for p in name.parts)]


def verify_folder(folder: Path, *, alone: bool = False) -> None:
    """Check a published folder against its manifest.

    Args:
        alone: whether other files may not be there either: for folders of which a library chooses what it reads.

    Raises:
        ArtifactError: naming the first file that is missing, cut short, whose bytes have changed, or that is too many.
    """
    for name, entry in listed_files(folder).items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing, though {MANIFEST} lists it: {REMAKE}")
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(
                f"{path}: {size} bytes, {MANIFEST} says {entry.bytes}: the file was cut or grew: {REMAKE}"
            )
        if sha256_file(path) != entry.sha256:
            raise ArtifactError(f"{path}: SHA-256 differs from {MANIFEST}: its bytes have changed: {REMAKE}")
    if alone and (found := unlisted_files(folder)):
        raise ArtifactError(f"{found[0]}: {MANIFEST} does not list it, and it might be read all the same: remove it")
