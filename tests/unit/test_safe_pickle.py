"""Hostile and damaged files of torch.save and pickle: each is refused by name, and none executes anything."""

import argparse
import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.safe_pickle import PLAIN, Inert, inert, read_pickle
from megatron_specialm.convert.torch_zip import read_torch_zip, settings_of
from megatron_specialm.convert.torch_zip_writing import write_torch_zip


class Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


def _saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def _raw(data: bytes, path: Path) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_call_is_refused_by_name_and_not_made(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    hostile = {
        "posix.system": Calls(os.system, f"touch {witness}"),
        "posix.mkdir": {"weight": [Calls(os.mkdir, str(witness))]},
        "builtins.getattr": Calls(getattr, "text", "join"),
        "builtins.eval": Calls(eval, f"open({str(witness)!r}, 'w')"),
        "builtins.print": (Calls(print),),
        "torch.serialization.load": Calls(torch.load, str(witness)),
        "collections.Counter": collections.Counter(a=1),
    }
    for name, evil in hostile.items():
        torch.save({"weight": torch.zeros(1), "hook": evil}, tmp_path / "model.pt", pickle_protocol=protocol)
        (tmp_path / "model.pickle").write_bytes(pickle.dumps(evil, protocol))
        for read in (
            lambda: read_torch_zip(tmp_path / "model.pt"),
            lambda: read_pickle(tmp_path / "model.pickle", PLAIN),
        ):
            with pytest.raises(CheckpointError, match=f"model.pt: asks for {name}|model.pickle: asks for {name}"):
                read()
    assert not witness.exists()


def test_a_method_of_something_allowed_is_refused(file: Path) -> None:
    chain = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93\x8c\x02ab\x85R."
    with pytest.raises(CheckpointError, match=r"collections\.OrderedDict\.fromkeys"):
        read_pickle(_raw(chain, file), PLAIN)
    assert pickle.loads(chain) == {"a": None, "b": None}  # which pickle does execute


def test_a_value_cannot_be_called(file: Path) -> None:
    with pytest.raises(CheckpointError, match="calls str"):
        read_pickle(_raw(b"\x80\x02X\x02\x00\x00\x00os)R.", file), PLAIN)


def _laughs() -> Any:
    value: list = ["ha"]
    for _ in range(60):
        value = [value, value]
    return value


def _deep() -> bytes:
    return b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."


def _own_element() -> Any:
    value: list = []
    value.append(value)
    return value


def _nested_key() -> bytes:
    """A tuple of twice a tuple of twice ...: to hash it takes for ever."""
    return b"\x80\x02}K\x01\x85q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60)) + b"K\x02s."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(_laughs()), "more than any checkpoint"),
        (_deep(), "more than any checkpoint"),
        (pickle.dumps(_own_element()), "contains itself"),
        (_nested_key(), "key of a dictionary is nested"),
        (pickle.dumps(Calls(collections.OrderedDict, [((1, 2), 3)])), "takes 0 positional arguments"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.", "expected 1152921504606846976 bytes"),
        (b"\x80\x02}r\xff\xff\xff\x7fj\xff\xff\xff\x7e.", "not a pickle"),
        (b"\x80\x02(.", "not a pickle"),
        (b"\x80\x02K\x01K\x02a.", "where a list is expected"),
        (b"\x80\x02\x8a\x01\x01Q.", "data outside"),
        (b"I01\n.", "opcode INT"),
        (b"", "not a pickle"),
        (pickle.dumps({"a": list(range(300))})[:-20], "not a pickle"),
    ],
)
def test_bombs_and_damage_are_refused(file: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_pickle(_raw(data, file), PLAIN)
    assert str(file) in str(caught.value)


def test_more_objects_than_any_checkpoint_has_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_specialm.convert.safe_pickle._MOST_STEPS", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 steps"):
        read_pickle(_raw(b"\x80\x02" + b"]" * 1000 + b".", file), PLAIN)


def test_pipes_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing"):
        with pytest.raises(CheckpointError, match=name):
            read_pickle(tmp_path / name, PLAIN)


def test_tensors_settings_and_slices_are_read(file: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    content = {
        "strided": base.t()[1:, ::2], "parameter": torch.nn.Parameter(base), "scalar": torch.tensor(3),
        "empty": torch.empty(0, 2),
        "half": base.bfloat16(), "bool": base > 3, "shape": base.shape, "type": torch.float16, "device": torch.device("cpu"),
        "state": torch.nn.Linear(2, 2).state_dict(), "args": argparse.Namespace(layers=2, path=Path("a/b")),
        "names": {"x"}, "bytes": b"raw",
    }  # fmt: skip
    read = read_torch_zip(_saved(content, file))
    for name in ("strided", "parameter", "scalar", "empty", "half", "bool"):
        assert torch.equal(read[name][()], content[name]) and read[name].dtype == content[name].dtype, name
        assert read[name].shape == content[name].shape
    assert torch.equal(read["strided"][2:4, slice(1, 2)], content["strided"][2:4, 1:2])
    assert read["shape"] == (4, 6) and read["type"] is torch.float16
    assert list(read["state"]) == ["weight", "bias"]
    assert settings_of(read["args"])["layers"] == 2


def test_reading_holds_no_file_open_and_maps_nothing(file: Path) -> None:
    read = read_torch_zip(_saved({"a": torch.ones(3, 2)}, file))
    before = len(os.listdir("/proc/self/fd"))
    part = read["a"][slice(0, 1),]
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(file) not in Path("/proc/self/maps").read_text()
    assert torch.equal(part, torch.ones(1, 2))


def _rewritten(path: Path, **how: Any) -> None:
    """Write the archive again without torch: compressed, without a record, or with another content of one."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(records)).split("/")[0]
    changed = how.get("change", {})
    with zipfile.ZipFile(path, "w", how.get("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in records.items():
            if name != f"{root}/{how.get('without')}":
                archive.writestr(name, changed.get(name.removeprefix(f"{root}/"), data))


def _cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def _lie(path: Path, record: bytes, offset: int, value: bytes) -> None:
    """Overwrite a field of a record's entry in the central directory."""
    data = bytearray(path.read_bytes())
    entry = data.rfind(b"PK\1\2", 0, data.rfind(record))
    data[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(data)


DAMAGES = {
    "compressed": (lambda path: _rewritten(path, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "without its storage": (lambda path: _rewritten(path, without="data/0"), "'0', which is not in the file"),
    "without its pickle": (lambda path: _rewritten(path, without="data.pkl"), "no data.pkl"),
    "a short storage": (
        lambda path: _rewritten(path, change={"data/0": b"1234"}),
        "4 bytes, fewer than the 6 elements",
    ),
    "big endian": (lambda path: _rewritten(path, change={"byteorder": b"big"}), "another byte order"),
    "truncated": (lambda path: _cut(path, path.stat().st_size - 30), "not a file of torch.save"),
    "half": (lambda path: _cut(path, path.stat().st_size // 2), "not a file of torch.save"),
    "empty": (lambda path: _cut(path, 0), "not a file of torch.save"),
    "a size that lies": (lambda path: _lie(path, b"data/0", 20, struct.pack("<II", 2**31, 2**31)), "header is wrong"),
    "an offset that lies": (lambda path: _lie(path, b"data/0", 42, struct.pack("<I", 7)), "header is wrong"),
    "text": (lambda path: path.write_text("nothing"), "not a file of torch.save"),
    "version 1": (lambda path: path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."), "before torch 1.6"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_archives_are_refused(file: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(_saved({"weight": torch.arange(6.0)}, file))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_zip(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "place", [(0, (7,), (1,)), (0, (2,), (6,)), (6, (1,), (1,)), (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2, 3), (3,))]
)
def test_a_tensor_that_leaves_its_storage_is_refused(file: Path, place: tuple) -> None:
    class Rebuilt(torch.Tensor):
        def __reduce_ex__(self, protocol: int) -> tuple:
            storage = torch.storage.TypedStorage(
                wrap_storage=base.untyped_storage(), dtype=torch.float32, _internal=True
            )
            return torch._utils._rebuild_tensor_v2, (storage, *place, False, collections.OrderedDict())

    base = torch.arange(6.0)
    torch.save({"weight": base.as_subclass(Rebuilt)}, file)
    with pytest.raises(CheckpointError, match="storage"):
        read_torch_zip(file)


def test_an_archive_within_a_file_is_read_where_it_lies(file: Path) -> None:
    one, two = io.BytesIO(), io.BytesIO()
    torch.save(torch.arange(5), one)
    torch.save(torch.arange(5) + 5, two)
    file.write_bytes(one.getvalue() + two.getvalue() + b"behind")
    start, length = len(one.getvalue()), len(two.getvalue())
    assert torch.equal(read_torch_zip(file, start=start, length=length)[()], torch.arange(5) + 5)
    for outside in ((start, 10**9), (-1, 10)):
        with pytest.raises(CheckpointError, match="are looked for"):
            read_torch_zip(file, start=outside[0], length=outside[1])


def test_torch_loads_what_is_written_slice_by_slice(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.arange(600.0).view(20, 30)
    content = {
        "rows": base, "again": base, "strided": base.t(), "scalar": torch.tensor(3), "empty": torch.empty(0, 2),
        "half": base.bfloat16(), "state": {"layers": [1, 2.5, None, "x"]}, "args": argparse.Namespace(layers=2),
        "shape": base.shape, "type": torch.bfloat16,
        "foreign": Inert("fractions.Fraction", 3, 4),
    }  # fmt: skip
    monkeypatch.setattr("megatron_specialm.convert.torch_zip_writing.SLICE_BYTES", 500)
    write_torch_zip(file, content)
    for mapped in (False, True):
        loaded = torch.load(file, weights_only=False, mmap=mapped)  # of our own making
        assert loaded.pop("foreign") == Fraction(3, 4)
        assert loaded["rows"].data_ptr() == loaded["again"].data_ptr()
        for name, value in loaded.items():
            assert torch.equal(value, content[name]) if isinstance(value, torch.Tensor) else value == content[name], (
                name
            )
    again = file.with_name("again.pt")
    write_torch_zip(
        again, {name: read_torch_zip(file, inert("fractions.*"))[name] for name in ("rows", "strided", "half")}
    )
    copied = torch.load(again)
    assert all(torch.equal(value, content[name]) for name, value in copied.items())
    with pytest.raises(CheckpointError, match="float8_e4m3fn cannot be written"):
        write_torch_zip(file.with_name("eight.pt"), {"x": base.to(torch.float8_e4m3fn)})


def test_of_large_tensors_only_slices_are_in_memory(tmp_path: Path) -> None:
    """Copied from one file to another, 500 MB pass through 250 MB of memory, mapped pages included."""
    program = (
        "import resource, sys; from pathlib import Path; from megatron_specialm.convert.torch_zip import read_torch_zip; "
        "from megatron_specialm.convert.torch_zip_writing import write_torch_zip; import torch; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; "
        "before = peak(); write_torch_zip(Path(sys.argv[2]), read_torch_zip(Path(sys.argv[1]))); print(peak() - before)"
    )
    path = tmp_path / "large.pt"
    storage = torch.UntypedStorage.from_file(str(tmp_path / "zeros"), True, 500_000_000)  # a file with a hole
    torch.save({"weight": torch.tensor([], dtype=torch.float32).set_(storage, 0, (125_000, 1000))}, path)
    (tmp_path / "zeros").unlink()
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "copy.pt")]
    assert int(subprocess.check_output(command, text=True)) < 250
    assert read_torch_zip(tmp_path / "copy.pt")["weight"].shape == (125_000, 1000)
