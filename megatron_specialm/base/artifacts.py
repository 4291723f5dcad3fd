"""Artifacts: one folder per task and digest, complete when its marker is there.

    <root>/artifacts/<stage>/<key>/<16 digits>/   what the task made for a digest that begins so
        task.json    the label: for which digest it is made, from what (`made_from`), and by which attempt (`incarnation`)
        done.json    the marker, written last: digest, cost, values, versions, and size and SHA-256 of every file
    <root>/<stage>/<key>   a symbolic link to the current one: where users look

A reader asks for an artifact by its digest, so work made from other settings, text or inputs is never taken for what is
wanted, and equal work is never done twice. Nothing here removes what was made: settings that change get a folder beside the
old one, the link is turned when the new one is whole, and old settings find the old work. `specialm clean` removes, on demand.

A node that Slurm has given up may be cut off but alive, with its ranks still running when the job runs again elsewhere. So each
attempt at a task writes its fencing token into the label when it begins, and publishes only while its token is there. In the
files the token is called `incarnation`.
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
SHOWN_DIGITS = 16  # of a digest, in the names of folders


@dataclass(frozen=True)
class Cost:
    """What a task cost; docs/methods.md has the rule.

    tokens: trained on (or read, for other stages), real ones.
    slots: token positions of the windows that these came in, padding included; 0 where nothing was read in windows.
    flops: of the model's or algorithm's own arithmetic, of every pass really made.
    wall_seconds: from the task's beginning to its end, over all attempts of a training.
    device_seconds: wall seconds times processes, a process on CPU counting as one device.
    """

    tokens: int
    flops: int
    wall_seconds: float
    device_seconds: float
    device: str
    processes: int
    slots: int = 0  # markers of earlier versions lack it

    def plus(self, other: "Cost") -> "Cost":
        """Both together: the devices of both, and the most processes."""
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
        """Both together."""
        return Spent(
            self.tokens + other.tokens,
            self.slots + other.slots,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Report:
    """What a stage function returns: its cost's parts that only it knows, and values worth telling.

    lost_seconds: of attempts before this one, where the stage goes on from them.
    apart: what was spent on work that decides nothing of the result: it is on record, and no part of the task's cost. Its
        seconds are within those of all attempts.
    earlier: what another artifact had cost that this one goes on from: on record beside the task's own cost.
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

    apart: the cost of work that decides nothing of the result.
    files: all of the artifact's, by their names in its folder, as they were when it was finished.
    earlier: what another artifact had cost by when this one went on from it.
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
        """The task's own cost and the earlier one."""
        return self.cost.plus(self.earlier) if self.earlier else self.cost


def artifact_folder(root: Path, stage: str, key: str, digest: str) -> Path:
    """Where a task's files for a digest stand."""
    return root / ARTIFACTS / stage / key / digest[:SHOWN_DIGITS]


def view(root: Path, stage: str, key: str) -> Path:
    """Where users find a task's current artifact: a symbolic link."""
    return root / stage / key


def artifact_folders(root: Path, stage: str, key: str) -> list[Path]:
    """All that there are of a task, of whatever digest, finished or not."""
    place = root / ARTIFACTS / stage / key
    return sorted(path for path in place.iterdir() if (path / LABEL).is_file()) if place.is_dir() else []


def begin_artifact(
    root: Path, stage: str, key: str, *, digest: str, made_from: Mapping[str, Any] | None = None
) -> Path:
    """The folder to write into. What an unfinished attempt for the same digest has left is kept to resume, with no file in it
    that another run folder shares.

    Args:
        made_from: what the digest is of.

    Raises:
        ArtifactError: the folder's label is of another digest, or something that is no link stands where users look.
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
    place = view(root, stage, key)
    if not (place / MARKER).exists():  # until there is a whole one, users see the work go on
        show_artifact(root, stage, key, digest)
    return folder


def show_artifact(root: Path, stage: str, key: str, digest: str) -> None:
    """Let users find this artifact where they look. One rename turns the link.

    Raises:
        ArtifactError: something that is no link stands there, which is nobody's to remove.
    """
    place = view(root, stage, key)
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
    """A new folder to copy a whole artifact into; on success it takes the artifact's place. Killed before, it leaves a folder
    that nobody takes for one. The caller holds the lock of placing; one that has lost it, on a node that was cut off, has a
    folder of another name."""
    final = artifact_folder(root, stage, key, digest)
    _remove_asides(final)
    aside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield aside
        write_json(aside / LABEL, {**read_label(aside), "incarnation": fencing_token()})
        if final.exists():  # an unfinished attempt at what is now whole
            shutil.rmtree(final)
        os.replace(aside, final)
        fsync_path(final.parent)
        show_artifact(root, stage, key, digest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_asides(folder: Path) -> None:
    """What take-overs that were killed have left of an artifact."""
    for aside in folder.parent.glob(f".{folder.name}.*tmp"):
        shutil.rmtree(aside, ignore_errors=True)


def _unshare(folder: Path) -> None:
    """Make the folder's own what may be written to: run folders that reuse each other's artifacts share large files by hard
    links. Published folders stay as they are, as nobody writes into them."""
    published = {path.parent for path in folder.rglob(MANIFEST)}
    for path in folder.rglob("*"):
        if not published.isdisjoint(path.parents):
            continue
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
            with atomic_path(path) as own:
                shutil.copyfile(path, own)


@dataclass(frozen=True)
class _Label:
    """Of which types a label's values are; those of earlier versions lack some."""

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
    made_from = label["made_from"]  # earlier versions named none
    if made_from and sha256_json(made_from) != label["digest"]:
        raise ArtifactError(
            f"{folder / LABEL}: what it says is not what its digest is of: the file is damaged; {remedy}"
        )
    return label


def fencing_token(environ: Mapping[str, str] = os.environ) -> str:
    """This process's fencing token, which no other attempt at a task has: job and attempt, or process id and host."""
    return environ.get(FENCING_TOKEN) or f"{os.getpid()}@{socket.gethostname()}"


def check_fence(folder: Path) -> None:
    """Before anything is published in an artifact's folder. A folder without a label is no task's.

    Raises:
        ArtifactError: another attempt has begun the task since.
    """
    if (folder / LABEL).exists() and (now := read_label(folder).get("incarnation")) != fencing_token():
        raise ArtifactError(
            f"{folder}: another attempt at this task, {now}, has taken over from {fencing_token()}, which publishes "
            "nothing more: leave the folder to it"
        )


def finish_artifact(root: Path, stage: str, key: str, marker: Marker) -> None:
    """Declare an artifact complete, with the files that it has now, and show it to users.

    Raises:
        ArtifactError: another attempt has taken over.
    """
    folder = artifact_folder(root, stage, key, marker.digest)
    whole = replace(marker, files=list_files(folder, without=(LABEL, MARKER)))
    content = json.loads(json.dumps(asdict(whole)))  # as it will be read
    check_fence(folder)
    write_json(folder / MARKER, {**content, "sha256": sha256_json(content)})
    show_artifact(root, stage, key, marker.digest)


def read_marker(folder: Path) -> Marker | None:
    """The completion marker of an artifact's folder, or of what a view shows; None where the task has not finished.

    Raises:
        ArtifactError: it is damaged.
    """
    path = folder / MARKER
    if not path.exists():
        return None
    remedy = "put it back from a copy, or remove it and run again"
    value = read_json(path, dict[str, Any], remedy=remedy)
    is_as_written = path.read_bytes() == json_text(value).encode()  # other bytes may still be the same numbers
    if value.pop("sha256", None) != sha256_json(value) or not is_as_written:
        raise ArtifactError(
            f"{path}: its content does not have the SHA-256 that it names: it was changed or is damaged; {remedy}"
        )
    return read_json(path, Marker, remedy=remedy)


def check_artifact(folder: Path) -> None:
    """Before an artifact is read: that it is finished, and its files are those that it was finished with.

    Raises:
        ArtifactError: it is not, naming the file.
    """
    marker = read_marker(folder)
    if marker is None:
        stage = folder.parts[-3]  # RUN/artifacts/STAGE/KEY/DIGEST
        raise ArtifactError(f"{folder / MARKER}: not there, so the task is not finished: run the stage {stage!r} first")
    check_files(folder, marker.files)


def is_complete(root: Path, stage: str, key: str, *, digest: str) -> bool:
    """Whether the artifact is there, finished, made for this digest, and all its files are there with their sizes."""
    folder = artifact_folder(root, stage, key, digest)
    marker = read_marker(folder)
    return marker is not None and marker.digest == digest and find_damage(folder, marker.files) is None
