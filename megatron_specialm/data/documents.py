"""Documents from files, one string at a time.

| name                          | a document is                                          |
|-------------------------------|--------------------------------------------------------|
| .jsonl, .jsonl.gz, .jsonl.zst | one line: a JSON object whose `text_field` is its text |
| .json.gz                      | the same, as c4 is published                           |
| .parquet                      | one row: its column `text_field`                       |
| .txt                          | the whole file                                         |
| hf:NAME[:CONFIG[:SPLIT]]      | one example of a Hugging Face dataset (split: train)   |

The order is that of the entries, of the sorted names behind a glob, and of the lines or rows. The launcher hashes files
through this module, so it imports neither torch nor, before they are needed, the readers of rarer formats.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import DataError, MachineError, MissingTextError
from megatron_specialm.base.files import sha256_json

HUB = "hf:"
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
READ_BYTES = 1 << 20  # of a file at a time


class Documents(Iterator[str]):
    """The documents of some entries. Empty and all-whitespace ones are passed over; `skipped` counts them so far.

    Raises:
        DataError: while iterating, naming the file, line or row, key and fix; at the end, if there was no document.
        MachineError: an `hf:` entry on a machine that cannot read it.
    """

    def __init__(self, entries: Sequence[str], text_field: str) -> None:
        self.skipped = 0
        self._entries = entries
        self._text_field = text_field
        self._documents = self._read()

    def __next__(self) -> str:
        return next(self._documents)

    def _read(self) -> Iterator[str]:
        empty = True
        for source in resolve_files(self._entries):
            for document in _read_source(source, self._text_field):
                if not document.strip():
                    self.skipped += 1
                else:
                    empty = False
                    yield document
        if empty:
            raise DataError(f"{', '.join(self._entries)}: no text: {self.skipped} documents, all empty; add documents")


def read_documents(entries: Sequence[str], *, text_field: str) -> Documents:
    """Stream the documents behind paths, globs and `hf:` names; see `Documents` for what is raised."""
    return Documents(entries, text_field)


def resolve_files(entries: Iterable[str]) -> list[Path | str]:
    """The files behind entries: paths, globs (sorted, `**` for any depth), and `hf:` names as they are.

    Raises:
        DataError: a file that is missing, a glob that matches none, or a folder.
    """
    return [file for entry in entries for file in _resolve(entry)]


def cut_in_shards(entries: Sequence[str], shards: int) -> list[list[Path | str]]:
    """The files of each shard: so many nearly equal ranges of the files behind the entries, in order.

    Raises:
        DataError: more shards than files, or what `resolve_files` raises.
    """
    files = resolve_files(entries)
    if shards > len(files):
        raise DataError(
            f"shards: {shards} shards of the {len(files)} files behind {', '.join(entries)}: a shard is at least one file: "
            f"set `shards` to {len(files)} or fewer, or cut the files smaller"
        )
    ends = [len(files) * number // shards for number in range(shards + 1)]
    return [files[start:end] for start, end in pairwise(ends)]


def hashed_files(entry: str) -> list[Path | str]:
    """The files whose content stands for one entry: those of a folder (of a tokenizer), or those that are read."""
    folder = Path(entry)
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else _resolve(entry)


def hash_content(entry: str, hashes: Mapping[Path, str]) -> str:
    """SHA-256 that changes with the content behind one entry, and not with where the files stand.

    A folder stands for its files and their names in it; an `hf:` entry for its name only.

    Args:
        hashes: SHA-256 of each of the `hashed_files`.
    """
    folder, files = Path(entry), hashed_files(entry)
    if folder.is_dir():
        return sha256_json([[Path(file).relative_to(folder).as_posix(), hashes[Path(file)]] for file in files])
    return hash_files(files, hashes)


def hash_files(files: Iterable[Path | str], hashes: Mapping[Path, str]) -> str:
    """SHA-256 over the content of files in their order; see `hash_content`."""
    return sha256_json([hashes[file] if isinstance(file, Path) else file for file in files])


def cut_text(text: str, size: int) -> Iterator[str]:
    """Cut a text in pieces of at most `size` characters, before a space where there is one; nothing is lost."""
    start = 0
    while len(text) - start > size:
        space = text.rfind(" ", start + 1, start + size + 1)
        end = space if space > 0 else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def _resolve(entry: str) -> list[Path | str]:
    if entry.startswith(HUB):
        return [entry]
    path = Path(entry)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise DataError(f"{entry}: is a folder: name its files, as in {path / '*.jsonl'}")
    files = sorted(Path(name) for name in glob.glob(entry, recursive=True) if Path(name).is_file())
    if not files:
        what = "no file matches" if glob.has_magic(entry) else "no such file"
        raise MissingTextError(f"{entry}: {what} (looked from {Path.cwd()}): correct the path")
    return list(files)


def _read_source(source: Path | str, text_field: str) -> Iterator[str]:
    if isinstance(source, str):
        return _read_hub(source, text_field)
    if source.name.endswith(JSON_LINES):
        return _read_lines(source, text_field)
    if source.suffix == ".parquet":
        return _read_parquet(source, text_field)
    if source.suffix == ".txt":
        return _read_text(source)
    raise DataError(f"{source}: not a known kind of text: use .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .txt")


# --- one JSON object a line -------------------------------------------------------------------------------------------


def _read_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(_bytes(path)), start=1):
        if line.strip():
            yield _text_of_line(line, f"{path}:{number}", text_field)


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    yield rest


def _text_of_line(line: bytes, where: str, text_field: str) -> str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}): convert the file to UTF-8") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}): write one JSON object a line") from None
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: a JSON {type(value).__name__}: write one JSON object a line, {{{text_field!r}: ...}}"
        )
    return _text_field(value, where, text_field)


def _text_field(record: dict[str, Any], where: str, text_field: str) -> str:
    """The text of a record, checked to be one that can be encoded."""
    keys = ", ".join(map(repr, record)) or "none"
    if text_field not in record:
        raise DataError(f"{where}: no key {text_field!r}; its keys are {keys}: set text_field to the one with the text")
    text = record[text_field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(
            f"{where}: {text_field!r} is {kind}, not text; the keys are {keys}: correct it or set text_field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character, as in "\ud83d"
        raise DataError(f"{where}: {text_field!r} is no Unicode text ({error}): remove the lone surrogate") from None
    return text


def _bytes(path: Path) -> Iterator[bytes]:
    """The decompressed content, in blocks."""
    try:
        yield from _zstd(path) if path.suffix == ".zst" else _plain_or_gzip(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cut short or damaged ({error}): copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _plain_or_gzip(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        while block := file.read(READ_BYTES):
            yield block


def _zstd(path: Path) -> Iterator[bytes]:
    """Frame by frame: the library's own reader takes the end of the file for the end of a frame that was cut short."""
    import zstandard

    frame, inside = zstandard.ZstdDecompressor().decompressobj(), False
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            while block:
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise DataError(f"{path}: not zstd or damaged ({error}): copy it again") from None
                block, inside = frame.unused_data, not frame.eof
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if inside:
        raise DataError(f"{path}: cut short: the last zstd frame has no end: copy it again")


# --- other sources ----------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> Iterator[str]:
    try:
        yield path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}): convert the file to UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                columns = ", ".join(map(repr, names))
                raise DataError(f"{path}: no column {text_field!r}; its columns are {columns}: set text_field")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    yield _text_field({text_field: value.as_py()}, f"{path}: row {row}", text_field)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a whole parquet file of UTF-8 text ({error}): copy or write it again") from None


def _read_hub(entry: str, text_field: str) -> Iterator[str]:
    for number, example in enumerate(_hub_examples(entry), start=1):
        yield _text_field(example, f"{entry}: example {number}", text_field)


def _hub_examples(entry: str) -> Iterator[dict[str, Any]]:
    name, config, split = [*entry.removeprefix(HUB).split(":", 2), "", ""][:3]
    try:
        import datasets
    except ImportError as error:
        raise MachineError(f"{entry}: {error}: pip install 'megatron_specialm[hub]', or name files instead") from None
    try:
        yield from datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the hub's client raises those of whichever HTTP library is below it
        raise MachineError(
            f"{entry}: the hub cannot be reached or has no such dataset ({type(error).__name__}: {error}): "
            "check the name and the network, or download it and name its files"
        ) from None
