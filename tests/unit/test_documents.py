"""Files as people have them: what is legal is read to its end, and what is not is named with its cause."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_specialm.base.errors import DataError, MachineError
from megatron_specialm.base.packages import import_package
from megatron_specialm.data import documents
from megatron_specialm.data.documents import Documents, resolve_files

LINES = b'{"text": "one"}\n{"text": "two"}\n'
TEXTS = ["one", "two"]


def read(path: Path, content: bytes | None = None) -> list[str]:
    if content is not None:
        path.write_bytes(content)
    return list(Documents([str(path)], text_field="text"))


def refused(path: Path, content: bytes | None, *words: str) -> None:
    with pytest.raises(DataError) as error:
        read(path, content)
    for word in (str(path), *words):
        assert word in str(error.value)


# --- compression ------------------------------------------------------------------------------------------------------


def zstd(content: bytes, *, window_log: int = 0) -> bytes:
    """One frame without its content's size, as a stream is written."""
    settings = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False)
    output = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=settings).stream_writer(output, closefd=False) as writer:
        writer.write(content[:5])
        writer.flush(zstandard.FLUSH_BLOCK)
        writer.write(content[5:])
    return output.getvalue()


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip
SKIPPED = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"


@pytest.mark.parametrize("ending", PACK)
def test_compressed_files_are_read_member_after_member(ending: str, tmp_path: Path) -> None:
    pack = PACK[ending]
    assert read(tmp_path / f"a.jsonl{ending}", pack(LINES)) == TEXTS
    assert read(tmp_path / f"a.JSONL{ending.upper()}", pack(LINES)) == TEXTS
    assert read(tmp_path / f"c4.json{ending}", pack(LINES)) == TEXTS
    assert read(tmp_path / f"a.txt{ending}", pack(b"one")) == ["one"]
    cut = pack(LINES[:7]) + pack(b"") + pack(LINES[7:]) + bytes(512)  # in the middle of a line; padded as on a tape
    assert read(tmp_path / f"parts.jsonl{ending}", cut) == TEXTS


@pytest.mark.parametrize("ending", PACK)
def test_what_is_wrong_with_a_compressed_file(ending: str, tmp_path: Path) -> None:
    path, whole = tmp_path / f"a.jsonl{ending}", PACK[ending](LINES)
    refused(path, whole[:-3], "cut short", "copy it again")
    refused(path, whole + whole[: len(whole) // 2], "cut short", "copy it again")
    refused(path, whole + b"garbage", "damaged", "copy it again")
    refused(path, b"", "no byte", "copy it again")
    refused(path, LINES, "its name says", "correct its name")
    refused(path, (bz2 if ending == ".gz" else gzip).compress(LINES), "compressed with", "correct its name")
    refused(tmp_path / "packed.jsonl", whole, f"add {ending} to its name")


def test_zstd_as_its_command_line_writes_it(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl.zst", SKIPPED + zstd(LINES[:9]) + SKIPPED + zstd(LINES[9:]) + SKIPPED) == TEXTS
    for window_log in (27, 31):  # zstd --long=27, --ultra --long=31
        assert read(tmp_path / "long.jsonl.zst", zstd(LINES, window_log=window_log)) == TEXTS
    dictionary = zstandard.train_dictionary(2000, [b'{"text": "sample %d words"}' % number for number in range(2000)])
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(LINES)
    refused(tmp_path / "dictionary.jsonl.zst", packed, "dictionary", "compress it without")


# --- lines ------------------------------------------------------------------------------------------------------------


def test_lines_as_other_systems_end_them(tmp_path: Path) -> None:
    assert read(tmp_path / "a.jsonl", LINES.replace(b"\n", b"\r\n")) == TEXTS
    assert read(tmp_path / "a.jsonl", LINES.rstrip()) == TEXTS
    assert read(tmp_path / "a.jsonl", b"\n\n" + LINES.replace(b"\n", b"\n \n")) == TEXTS


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = codecs.BOM_UTF8
    assert read(tmp_path / "a.jsonl", mark + LINES + mark + LINES) == TEXTS * 2  # two files, concatenated
    assert read(tmp_path / "a.jsonl.gz", gzip.compress(mark + LINES)) == TEXTS
    assert read(tmp_path / "a.jsonl", b'{"text": "\\ufeffone"}\n') == ["one"]
    assert read(tmp_path / "a.txt", mark + b"one") == ["one"]
    refused(tmp_path / "only.txt", mark, "no text")
    for encoding in ("utf-16", "utf-32"):
        refused(tmp_path / "a.jsonl", LINES.decode().encode(encoding), "a.jsonl:1", "UTF-16", "convert")
        refused(tmp_path / "a.txt", "one".encode(encoding), "UTF-16", "convert")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "x", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": 12345}', "'text' is int"),
        (b'{"text": ["x"]}', "'text' is list"),
        (b'{"text": "x"} {}', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"7", "a JSON int"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_cause(line: bytes, words: str, tmp_path: Path) -> None:
    refused(tmp_path / "a.jsonl", LINES + line + b"\n", "a.jsonl:3", words)


def test_what_stands_beside_the_text_is_not_converted(tmp_path: Path) -> None:
    lines = b'{"id": ' + b"9" * 5000 + b', "text": "one"}\n{"score": NaN, "low": -Infinity, "text": "two"}\n'
    assert read(tmp_path / "a.jsonl", lines) == TEXTS


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = b'{"text": "' + b"x" * 5_000_000 + b'"}\n'
    assert [len(text) for text in read(tmp_path / "a.jsonl", LINES + long + LINES)] == [3, 3, 5_000_000, 3, 3]
    monkeypatch.setattr(documents, "LINE_BYTES", 2**21)
    refused(tmp_path / "a.jsonl", LINES + long, "a.jsonl:3", "a line of more than")


# --- names ------------------------------------------------------------------------------------------------------------


def test_nothing_that_a_glob_finds_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "folder.jsonl").mkdir()
    assert resolve_files([str(tmp_path / "*.jsonl")]) == [tmp_path / "a.jsonl"]
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "moved.jsonl")
    for entry in ("*.jsonl", "b.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl: a link to .*moved\.jsonl, where no file is"):
            resolve_files([str(tmp_path / entry)])
    with pytest.raises(DataError, match="no such file"):
        resolve_files([str(tmp_path / ("x" * 300))])


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    for name in ("a.json", "a.csv", "a.parquet.gz", "a.jsonl.lz4", "jsonl"):
        refused(tmp_path / name, LINES, "not a known kind of text")


# --- parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet_columns_of_text(kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2], "text": pa.array(TEXTS).cast(kind)}), tmp_path / "a.PARQUET")
    assert read(tmp_path / "a.PARQUET") == TEXTS


def test_what_is_wrong_with_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for column, words in (
        (pa.array(["one", None]), "row 2: 'text' is null"),
        (pa.array([1]), "row 1: 'text' is int"),
        (pa.array([["one"]]), "row 1: 'text' is list"),
        (pa.array([b"one", b"\xff"]), "row 2: not UTF-8"),
    ):
        pq.write_table(pa.table({"text": column}), path)
        refused(path, None, words)
    pq.write_table(pa.table({"body": ["one"]}), path)
    refused(path, None, "no column 'text'; its columns are 'body'")
    refused(path, path.read_bytes()[:-10], "not a whole parquet file")
    refused(path, b"", "not a whole parquet file")
    refused(path, LINES, "not a whole parquet file")


# --- packages ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_a_packages_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_package").mkdir()
    (tmp_path / "json").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package', only the folder"):
        import_package("no_such_package")
    assert import_package("json") is json


def test_the_hub_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    with pytest.raises(MachineError, match=r"only the folder .*: pip install 'megatron_specialm\[hub\]'"):
        list(Documents(["hf:some/set"], text_field="text"))


def test_documents_are_counted_in_bytes_of_utf8(tmp_path: Path) -> None:
    texts = ["plain", "  ", "naïve ½ 日本", "\ufeffmarked"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = Documents([str(tmp_path / "text.jsonl")], text_field="text")
    assert len(list(documents)) == 3
    assert documents.text_bytes == len("plain") + len("naïve ½ 日本".encode()) + len("marked")
