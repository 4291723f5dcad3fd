import errno
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_specialm.base.errors import ArtifactError, MachineError, machine_errors
from megatron_specialm.base.files import atomic_path, publish_folder, read_json, verify_folder, write_json
from megatron_specialm.train.checkpoint import save_checkpoint


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


def test_a_full_disk_is_said_of_the_file_that_was_written(tmp_path: Path) -> None:
    """The system's own error names no file here."""
    path = tmp_path / "value.json"
    with pytest.raises(MachineError, match=rf"^{path}: the disk is full"), machine_errors(), atomic_path(path):
        Path("/dev/full").write_text("x")


def test_an_error_without_a_file_is_said_of_none() -> None:
    """Semaphores, sockets and open files: no word of the run folder, but of the code that asked."""
    with (
        pytest.raises(MachineError, match=r"^a file that unit/test_files.py:\d+ \w+ works on: .*read-only"),
        machine_errors(),
    ):
        raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda place: place.mkdir(parents=True, exist_ok=True), "is there already: remove it"),  # the place is a file
        (lambda place: place.parent.write_text("x"), "a folder stands where a file is needed"),
        (lambda place: (place / "inside").write_text("x"), "a file stands where a folder is needed"),
    ],
)
def test_what_stands_in_the_way_is_named(ask: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    (place := tmp_path / "run").write_text("not a folder")
    with pytest.raises(MachineError, match=rf"^{tmp_path}\S*: .*{says}"), machine_errors():
        ask(place)


def test_a_limit_on_the_size_of_files_is_said(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(MachineError, match="ulimit -f"), machine_errors():
            (tmp_path / "large").write_bytes(bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "value.json", float("nan"))
    assert not list(tmp_path.iterdir())


def _published(folder: Path) -> Path:
    aside = folder / "aside"
    aside.mkdir()
    (aside / "a.bin").write_bytes(bytes(range(256)))
    publish_folder(aside, folder / "final")
    return folder / "final"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut"),
        (lambda path: path.write_bytes(b"\x01" + path.read_bytes()[1:]), "changed"),
    ],
)
def test_a_published_folder_notices_damage(tmp_path: Path, damage, says: str) -> None:
    final = _published(tmp_path)
    verify_folder(final)
    damage(final / "a.bin")
    with pytest.raises(ArtifactError, match=says):
        verify_folder(final)


def test_a_folder_without_its_manifest_is_not_whole(tmp_path: Path) -> None:
    final = _published(tmp_path)
    (final / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        verify_folder(final)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
def test_files_and_folders_follow_the_umask_and_the_folders_group(tmp_path: Path, mask: int) -> None:
    """Checkpoints too, although safetensors writes for the owner alone."""
    shared = tmp_path / "shared"
    shared.mkdir()
    group = next(iter({*os.getgroups(), os.getgid()} - {os.getegid()}), os.getegid())
    group = 12345 if os.geteuid() == 0 else group
    os.chown(shared, -1, group)
    shared.chmod(0o2775)
    before = os.umask(mask)
    try:
        _published(shared)
        save_checkpoint(shared / "slm", step=1, weights={"w": torch.ones(2)}, optimizer_state={}, state={})
    finally:
        os.umask(before)
    made = [path for path in shared.rglob("*")]
    assert {path.name for path in made} >= {"a.bin", "manifest.json", "model-00000.safetensors"}
    for path in made:
        status = path.stat()
        wanted = (0o2777 if path.is_dir() else 0o666) & ~mask
        assert (oct(stat.S_IMODE(status.st_mode)), status.st_gid) == (oct(wanted), group), path
