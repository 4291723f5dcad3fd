"""Artifacts: one folder per task and digest, complete when its marker is there.

    <root>/artifacts/<stage>/<key>/<16 digits>/   a task's output; the folder is named by the first digits of the digest
        task.json    the label: the digest, what it covers (`made_from`), and the attempt's fencing token (`incarnation`)
        done.json    the marker, written last: digest, cost, values, versions, and size and SHA-256 of every file
    <root>/<stage>/<key>   a symbolic link to the current artifact, for users

Readers find an artifact by its digest. So an artifact of other settings, text or inputs is never used by mistake, and the same
work is never done twice. Changed settings get a new folder, and the link moves when the new artifact is complete; restored
settings find the old artifact. Finished artifacts are removed only by `specialm clean`.

A node that Slurm has given up on may be cut off but alive, with ranks that still run when the job runs again elsewhere. So each
attempt at a task writes its fencing token into the label when it begins, and publishes only while the label has that token. The
files call the token `incarnation`.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import (
    MANIFEST,
    ManifestEntry,
    atomic_path,
    fsync_path,
    json_text,
    read_json,
    remove_leftovers,
    sha256_json,
    write_json,
)
from megatron_specialm.base.integrity import check_files, find_damage, list_files
from megatron_specialm.base.protocol import FENCING_TOKEN

ARTIFACTS = "artifacts"
LABEL, MARKER = "task.json", "done.json"
STATE, RESULT = "state.json", "result.json"  # of a training: see `checkpoint/steps.py`
SHOWN_DIGITS = 16  # of a digest, in the names of folders


@dataclass(frozen=True)
class Cost:
    """The cost of a task; docs/methods.md has the rule.

    tokens: trained on (for other stages: read), without padding.
    slots: token positions of their windows, with padding; 0 if no windows were read.
    flops: of the model or algorithm, over all passes.
    wall_seconds: from the task's beginning to its end, over all attempts of a training.
    device_seconds: wall seconds times processes; a process on CPU counts as one device.
    """

    tokens: int
    flops: int
    wall_seconds: float
    device_seconds: float
    device: str
    processes: int
    slots: int = 0  # missing in markers of earlier versions

    def plus(self, other: "Cost") -> "Cost":
        """The sum, with the devices of both and the larger number of processes."""
        devices = dict.fromkeys((*self.device.split(", "), *other.device.split(", ")))
        return Cost(
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.wall_seconds + other.wall_seconds,
            self.device_seconds + other.device_seconds,
            ", ".join(devices),
            max(self.processes, other.processes),
            self.slots + other.slots,
        )


@dataclass(frozen=True)
class Spent:
    """A part of a task's cost."""

    tokens: int = 0
    slots: int = 0
    flops: int = 0
    seconds: float = 0.0  # wall seconds

    def plus(self, other: "Spent") -> "Spent":
        """The sum."""
        return Spent(
            self.tokens + other.tokens,
            self.slots + other.slots,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Report:
    """The return value of a stage function: the parts of the cost that only it knows, and values for the results.

    lost_seconds: of earlier attempts that this one continues.
    apart: the cost of work that does not affect the result. It is recorded, but is not part of the task's cost. Its seconds are
        included in those of all attempts.
    earlier: the cost of another artifact that this one continues, recorded beside the task's own cost.
    """

    tokens: int = 0
    flops: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    slots: int = 0
    lost_seconds: float = 0.0
    apart: Spent = Spent()
    earlier: Cost | None = None


@dataclass(frozen=True)
class Marker:
    """The content of a completion marker.

    apart: the cost of work that does not affect the result.
    files: all files of the finished artifact, by their path in its folder.
    earlier: the cost of another artifact that this one continued.
    """

    digest: str
    cost: Cost
    values: dict[str, Any]
    versions: dict[str, str]
    apart: Cost | None = None
    files: Mapping[str, ManifestEntry] = field(default_factory=dict)
    earlier: Cost | None = None

    @property
    def whole_cost(self) -> Cost:
        """The sum of `cost` and `earlier`."""
        return self.cost.plus(self.earlier) if self.earlier else self.cost


def artifact_folder(root: Path, stage: str, key: str, digest: str) -> Path:
    """The folder of a task's artifact for a digest."""
    return root / ARTIFACTS / stage / key / digest[:SHOWN_DIGITS]


def artifact_link(root: Path, stage: str, key: str) -> Path:
    """The symbolic link to a task's current artifact, for users."""
    return root / stage / key


def artifact_folders(root: Path, stage: str, key: str) -> list[Path]:
    """The folders of all artifacts of a task, of any digest, finished or not."""
    place = root / ARTIFACTS / stage / key
    return sorted(path for path in place.iterdir() if (path / LABEL).is_file()) if place.is_dir() else []


def begin_artifact(
    root: Path, stage: str, key: str, *, digest: str, made_from: Mapping[str, Any] | None = None
) -> Path:
    """Make the folder to write into. Files of an unfinished attempt for the same digest stay, so that it can be resumed; those
    that another run folder shares by hard links are copied.

    Args:
        made_from: the content that the digest covers.

    Raises:
        ArtifactError: the folder's label has another digest, or the link's path is occupied.
    """
    folder = artifact_folder(root, stage, key, digest)
    if (folder / LABEL).exists() and read_label(folder)["digest"] != digest:
        raise ArtifactError(
            f"{folder / LABEL}: is of another digest than {digest}: the file is damaged; move {folder} away"
        )
    _remove_asides(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    remove_leftovers(folder)
    _unshare(folder)
    write_json(folder / LABEL, {"digest": digest, "incarnation": fencing_token(), "made_from": dict(made_from or {})})
    place = artifact_link(root, stage, key)
    if not (place / MARKER).exists():  # users see an unfinished artifact only if none is complete
        link_artifact(root, stage, key, digest)
    return folder


def link_artifact(root: Path, stage: str, key: str, digest: str) -> None:
    """Link to this artifact, by one rename.

    Raises:
        ArtifactError: the link's path is occupied by something else, which this program does not remove.
    """
    place = artifact_link(root, stage, key)
    target = Path(os.path.relpath(artifact_folder(root, stage, key, digest), place.parent))
    if place.is_symlink() and os.readlink(place) == str(target):
        return
    if place.exists() and not place.is_symlink():
        raise ArtifactError(
            f"{place}: is not a link of this program, which shows what {stage}/{key} made there: move it away, or choose "
            "another root"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{key}.{secrets.token_hex(4)}.tmp")
    aside.symlink_to(target)
    try:
        os.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)
    fsync_path(place.parent)


@contextlib.contextmanager
def placed_artifact(root: Path, stage: str, key: str, digest: str) -> Iterator[Path]:
    """A temporary folder to copy a complete artifact into; on success it becomes the artifact. If the process is killed, no
    reader uses the folder. The caller holds `hold_placing`. A caller that has lost this lock, on a node that was cut off, has a
    temporary folder of another name."""
    final = artifact_folder(root, stage, key, digest)
    _remove_asides(final)
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        write_json(aside / LABEL, {**read_label(aside), "incarnation": fencing_token()})
        if final.exists():  # an unfinished attempt
            shutil.rmtree(final)
        os.replace(aside, final)
        fsync_path(final.parent)
        link_artifact(root, stage, key, digest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_asides(folder: Path) -> None:
    """Remove the temporary folders of killed processes."""
    for aside in folder.parent.glob(f".{folder.name}.*tmp"):
        shutil.rmtree(aside, ignore_errors=True)


def _unshare(folder: Path) -> None:
    """Copy writable files that other run folders share by hard links. Published folders are skipped: nothing writes into
    them."""
    published = {path.parent for path in folder.rglob(MANIFEST)}
    for path in folder.rglob("*"):
        if not published.isdisjoint(path.parents):
            continue
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
            with atomic_path(path) as own:
                shutil.copyfile(path, own)


@dataclass(frozen=True)
class _Label:
    """The types of a label's values; earlier versions lack some."""

    digest: str
    incarnation: str | None = None
    made_from: dict[str, Any] = field(default_factory=dict)


def read_label(folder: Path) -> dict[str, Any]:
    """An artifact's label: `digest`, `incarnation`, `made_from`.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    remedy = f"move {folder} away"
    read_json(folder / LABEL, _Label, remedy=remedy)
    label = {"made_from": {}, **read_json(folder / LABEL, dict[str, Any], remedy=remedy)}
    made_from = label["made_from"]  # missing in earlier versions
    if made_from and sha256_json(made_from) != label["digest"]:
        raise ArtifactError(f"{folder / LABEL}: its made_from does not have its digest: the file is damaged; {remedy}")
    return label


def fencing_token() -> str:
    """This process's fencing token, unique to its attempt at a task: job and attempt, or process id and host."""
    return os.environ.get(FENCING_TOKEN) or f"{os.getpid()}@{socket.gethostname()}"


def check_fence(folder: Path) -> None:
    """Check the fencing token. Call it before publishing anything in an artifact's folder. A folder without a label has none.

    Raises:
        ArtifactError: another attempt at the task has begun since.
    """
    if (folder / LABEL).exists() and (now := read_label(folder).get("incarnation")) != fencing_token():
        raise ArtifactError(
            f"{folder}: another attempt at this task, {now}, has taken over from {fencing_token()}, which publishes "
            "nothing more: leave the folder to it"
        )


def finish_artifact(root: Path, stage: str, key: str, marker: Marker) -> None:
    """Write the marker of an artifact, with its current files, and link to it.

    Raises:
        ArtifactError: another attempt at the task has begun since.
    """
    folder = artifact_folder(root, stage, key, marker.digest)
    complete = replace(marker, files=list_files(folder, without=(LABEL, MARKER)))
    content = json.loads(json.dumps(asdict(complete)))  # with JSON's types, as a reader gets them
    check_fence(folder)
    write_json(folder / MARKER, {**content, "sha256": sha256_json(content)})
    link_artifact(root, stage, key, marker.digest)


def read_marker(folder: Path) -> Marker | None:
    """The completion marker in an artifact's folder or behind a link to it; None if the task has not finished.

    Raises:
        ArtifactError: it is damaged.
    """
    path = folder / MARKER
    if not path.exists():
        return None
    remedy = "put it back from a copy, or remove it and run again"
    value = read_json(path, dict[str, Any], remedy=remedy)
    is_as_written = path.read_bytes() == json_text(value).encode()  # a damaged file may parse to the same numbers
    if value.pop("sha256", None) != sha256_json(value) or not is_as_written:
        raise ArtifactError(
            f"{path}: its content does not have the SHA-256 that it names: it was changed or is damaged; {remedy}"
        )
    return read_json(path, Marker, remedy=remedy)


def finished_marker(folder: Path) -> Marker:
    """The completion marker in an artifact's folder.

    Raises:
        ArtifactError: it is damaged, or the task has not finished.
    """
    marker = read_marker(folder)
    if marker is None:
        stage = folder.parts[-3]  # RUN/artifacts/STAGE/KEY/DIGEST
        raise ArtifactError(f"{folder / MARKER}: not there, so the task is not finished: run the stage {stage!r} first")
    return marker


def check_artifact(folder: Path) -> None:
    """Check that an artifact is finished and its files are unchanged. Call it before reading the artifact.

    Raises:
        ArtifactError: names the file that is missing or has changed.
    """
    check_files(folder, finished_marker(folder).files)


def is_complete(root: Path, stage: str, key: str, *, digest: str) -> bool:
    """Whether the artifact of this digest is finished, and all its files exist with their sizes."""
    folder = artifact_folder(root, stage, key, digest)
    marker = read_marker(folder)
    return marker is not None and marker.digest == digest and find_damage(folder, marker.files) is None
