import errno
from pathlib import Path

import pytest

from megatron_specialm.base.errors import ArtifactError, MachineError, machine_errors
from megatron_specialm.base.files import atomic_path, publish_folder, read_json, verify_folder, write_json


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
