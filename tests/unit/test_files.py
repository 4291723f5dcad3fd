import contextlib
import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_specialm.base.arrays import new_array, write_array
from megatron_specialm.base.artifacts import begin_artifact
from megatron_specialm.base.errors import ArtifactError, MachineError, machine_errors
from megatron_specialm.base.files import (
    atomic_path,
    publish_folder,
    read_json,
    verify_folder,
    write_json,
    write_text,
)
from megatron_specialm.base.tensors import save_tensors
from megatron_specialm.checkpoint.checkpoint import save_checkpoint


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


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes: not for longer than needed, as pytest's own output may be a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_limit_on_the_size_of_files_is_said(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="ulimit -f"), small_files(), machine_errors():
        (tmp_path / "large").write_bytes(bytes(2000))


def test_an_array_that_finds_no_room_is_not_begun(tmp_path: Path) -> None:
    begun = False
    says = rf"^{tmp_path}/train\.npy: larger than files may be.*it takes 4,128 bytes, and [\d,]+ are free"
    found = pytest.raises(MachineError, match=says)
    with found, small_files(), machine_errors(), new_array(tmp_path / "train.npy", dtype=np.float32, shape=(10, 100)):
        begun = True
    assert not begun and not list(tmp_path.iterdir())


def test_tensors_that_find_no_room_are_the_machines_doing(tmp_path: Path) -> None:
    """Checkpoints and exports; safetensors' own error is no `OSError`."""
    path = tmp_path / "model.safetensors"
    larger = pytest.raises(MachineError, match=rf"^{path}: larger than files may be")
    with larger, small_files(), machine_errors():
        save_tensors({"w": torch.ones(1000)}, path)


def test_a_disk_that_is_full_ends_no_process_by_a_bus_error(tmp_path: Path) -> None:
    """A filesystem of 1 MiB, where one can be mounted without being root, by a namespace of users."""
    program = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from megatron_specialm.base.arrays import new_array; from megatron_specialm.base.errors import machine_errors\n"
        "path = Path(sys.argv[1])\n"
        "try:\n"
        "    with machine_errors(), new_array(path / 'a.npy', dtype=np.float32, shape=(10**6,)) as array: array[:] = 1\n"
        "except ValueError as error: print(error, list(path.iterdir()))\n"
    )
    inside = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*mounted, f"mount -t tmpfs none {tmp_path}"], capture_output=True).returncode != 0:
        pytest.skip("no filesystem can be mounted here")
    done = subprocess.run([*mounted, inside, sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert f"{tmp_path}/a.npy: the disk is full" in done.stdout and done.stdout.strip().endswith("[]")


def test_a_new_attempt_removes_what_killed_ones_have_left_and_nothing_else(tmp_path: Path) -> None:
    folder = begin_artifact(tmp_path, "embed", "generic", digest="d" * 64)
    program = (
        "import os, signal, sys; from pathlib import Path; from megatron_specialm.base.arrays import new_array\n"
        "with new_array(Path(sys.argv[1]), dtype='<f4', shape=(9,)): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder / "parts" / "train.npy")], check=False)
    (left,) = (folder / "parts").iterdir()
    assert left.name.startswith(".train.npy.") and left.name.endswith(".tmp")
    foreign = [folder / name for name in ("notes.tmp", ".notes.tmp", ".train.npy.x1.tmp", "train.npy.1.tmp")]
    for path in foreign:
        path.touch()
    begin_artifact(tmp_path, "embed", "generic", digest="d" * 64)
    assert not left.exists() and all(path.exists() for path in foreign)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o277], ids=oct)
def test_what_may_hold_a_secret_is_the_owners_alone_from_the_first_byte_on(
    tmp_path: Path, mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    write = Path.write_text

    def looked_at(path: Path, *args: Any, **settings: Any) -> int:
        seen.append(stat.S_IMODE(path.stat().st_mode))
        return write(path, *args, **settings)

    monkeypatch.setattr(Path, "write_text", looked_at)
    before = os.umask(mask)
    try:
        write_text(tmp_path / "site.yaml", "token", private=True)
    finally:
        os.umask(before)
    assert [*map(oct, seen), oct(stat.S_IMODE((tmp_path / "site.yaml").stat().st_mode))] == ["0o600", "0o600"]


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


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077], ids=oct)
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
        write_array(shared / "train.npy", np.ones(3))
    finally:
        os.umask(before)
    made = [path for path in shared.rglob("*")]
    assert {path.name for path in made} >= {"a.bin", "manifest.json", "model-00000.safetensors", "train.npy"}
    for path in made:
        status = path.stat()
        wanted = (0o2777 if path.is_dir() else 0o666) & ~mask
        assert (oct(stat.S_IMODE(status.st_mode)), status.st_gid) == (oct(wanted), group), path
