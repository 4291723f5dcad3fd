"""Documents from files, one string at a time.

| name                     | a document is                                          |
|--------------------------|--------------------------------------------------------|
| .jsonl                   | one line: a JSON object whose `text_field` is its text |
| .json, compressed        | the same, as c4 is published                           |
| .parquet                 | one row: its column `text_field`                       |
| .txt                     | the whole file                                         |
| hf:NAME[:CONFIG[:SPLIT]] | one example of a Hugging Face dataset (split: train)   |

All but parquet may be compressed: `.gz`, `.zst`, `.bz2`, `.xz` after the name (`data/compressed.py`). Upper and lower case of
extensions are the same. Text is UTF-8; a byte order mark at the beginning of a file, a line or a text is dropped. If a JSON
object has a key twice, the last value is used.

The order is that of the entries, of the sorted names of a glob, and of the lines or rows. The launcher resolves files with this
module, so it does not import torch, and readers of rarer formats only when they are needed.
"""

import codecs
import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import DataError, MachineError, MissingTextError
from megatron_specialm.base.packages import import_package
from megatron_specialm.config.explain import did_you_mean
from megatron_specialm.data.compressed import plain_name, read_blocks

HUB = "hf:"
LINE_BYTES = 1 << 30  # the longest line: more is a file without line breaks
BYTE_ORDER_MARK = "\ufeff"


class Documents(Iterator[str]):
    """The documents of paths, globs and `hf:` names, without empty and all-whitespace ones. `skipped` counts those so far, and
    `text_bytes` the UTF-8 bytes of the others.

    Raises:
        DataError: while iterating, naming the file, line or row, key and fix; at the end, if there was no document.
        MachineError: an `hf:` entry on a machine that cannot read it.
    """

    def __init__(self, entries: Sequence[str], *, text_field: str) -> None:
        self.skipped = self.text_bytes = 0
        self._entries = entries
        self._text_field = text_field
        self._documents = self._read()

    def __next__(self) -> str:
        return next(self._documents)

    def _read(self) -> Iterator[str]:
        empty = True
        for source in resolve_files(self._entries):
            for found in _read_source(source, self._text_field):
                document = found.removeprefix(BYTE_ORDER_MARK)
                if not document.strip():
                    self.skipped += 1
                else:
                    empty = False
                    self.text_bytes += len(document.encode(errors="surrogatepass"))
                    yield document
        if empty:
            raise DataError(f"{', '.join(self._entries)}: no text: {self.skipped} documents, all empty; add documents")


def resolve_files(entries: Iterable[str]) -> list[Path | str]:
    """The files of entries: paths, globs (sorted, `**` for any depth), and `hf:` names unchanged.

    Raises:
        DataError: a file that is missing, a glob that matches none, or a folder.
    """
    return [file for entry in entries for file in _resolve(entry)]


def cut_in_shards(entries: Sequence[str], shards: int) -> list[list[Path | str]]:
    """The files of each shard: nearly equal ranges of the files of the entries, in order.

    Raises:
        DataError: more shards than files, or an error of `resolve_files`.
    """
    files = resolve_files(entries)
    if shards > len(files):
        raise DataError(
            f"shards: {shards} shards of the {len(files)} files behind {', '.join(entries)}: a shard is at least one file: "
            f"set `shards` to {len(files)} or fewer, or cut the files smaller"
        )
    ends = [len(files) * number // shards for number in range(shards + 1)]
    return [files[start:end] for start, end in pairwise(ends)]


def cut_text(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of at most `size` characters, before a space if there is one; no character is dropped."""
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
    if os.path.isfile(entry):  # os.path returns False where pathlib may raise
        return [path]
    if os.path.isdir(entry):
        raise DataError(f"{entry}: is a folder: name its files, as in {path / '*.jsonl'}")
    if os.path.lexists(entry):
        raise DataError(f"{entry}: {_no_file(entry)}")
    names = sorted(glob.glob(entry, recursive=True))
    files = [Path(name) for name in names if os.path.isfile(name)]
    for name in names:  # of a glob's matches only folders are skipped
        if not os.path.isfile(name) and not os.path.isdir(name):
            raise DataError(f"{name}: {_no_file(name)}")
    if not files:
        what = "no file matches" if glob.has_magic(entry) else "no such file"
        raise MissingTextError(f"{entry}: {what} (looked from {Path.cwd()}): correct the path")
    return list(files)


def _no_file(name: str) -> str:
    if os.path.islink(name):
        return f"a link to {os.readlink(name)}, where no file is: correct the link or remove it"
    return "neither a file nor a folder: name files only"


def text_format(source: Path) -> str:
    """The format of a file, by its name: JSON `lines`, one `text`, or the rows of a `table`.

    Raises:
        DataError: none of these.
    """
    name = plain_name(source)
    if name.endswith(".jsonl") or (name.endswith(".json") and name != source.name.lower()):
        return "lines"
    if name.endswith(".txt"):
        return "text"
    if source.suffix.lower() == ".parquet":
        return "table"
    raise DataError(
        f"{source}: not a known kind of text: use .jsonl or .txt (also with .gz, .zst, .bz2 or .xz), or .parquet"
    )


def _read_source(source: Path | str, text_field: str) -> Iterator[str]:
    if isinstance(source, str):
        return _read_hub(source, text_field)
    kind = text_format(source)
    if kind == "lines":
        return _read_lines(source, text_field)
    return _read_text(source) if kind == "text" else _read_parquet(source, text_field)


# --- one JSON object a line -------------------------------------------------------------------------------------------

# Integers are not needed, and Python refuses to convert very long ones: `len` stands in for their conversion.
_DECODER = json.JSONDecoder(parse_int=len)


def _read_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        text = _decoded(line, where)
        if text.strip():
            yield _text_of_line(text, where, text_field)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without line breaks; the last one may lack its own."""
    number, size = 1, 0  # of the current line
    parts: list[bytes] = []  # of the current line, joined once, so that long lines take linear time
    for block in read_blocks(path):
        first, *others = block.split(b"\n")
        parts.append(first)
        size += len(first)
        if others:
            *complete, rest = others
            yield b"".join(parts)
            yield from complete
            number, parts, size = number + len(others), [rest], len(rest)
        if size > LINE_BYTES:
            raise DataError(
                f"{path}:{number}: a line of more than {LINE_BYTES / 2**30:g} GiB: write one JSON object a line, and cut "
                "longer documents"
            )
    yield b"".join(parts)


def _decoded(content: bytes, where: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark."""
    # UTF-32's little-endian mark has the same first bytes as UTF-16's.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{where}: UTF-16 or UTF-32 by its byte order mark: convert the file to UTF-8")
    try:
        return content.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}): convert the file to UTF-8") from None


def _text_of_line(line: str, where: str, text_field: str) -> str:
    try:
        value = _DECODER.decode(line)
    except RecursionError:
        raise DataError(
            f"{where}: JSON nested too deeply to be read: remove what is not needed beside the text"
        ) from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}): write one JSON object a line") from None
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: a JSON {type(value).__name__}: write one JSON object a line, {{{text_field!r}: ...}}"
        )
    return _text_field(value, where, text_field)


def _text_field(record: dict[str, Any], where: str, text_field: str) -> str:
    """The text of a record. Refuses what is no text, or cannot be encoded."""
    if isinstance(text := record.get(text_field), str):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can hold a lone surrogate, as in "\ud83d"
            raise DataError(
                f"{where}: {text_field!r} is no Unicode text ({error}): remove the lone surrogate"
            ) from None
        return text
    keys = ", ".join(map(repr, record)) or "none"
    if text_field not in record:
        near = did_you_mean(text_field, list(record))
        raise DataError(
            f"{where}: no key {text_field!r}{near}; its keys are {keys}: set text_field to the one with the text"
        )
    kind = "null" if text is None else type(text).__name__
    raise DataError(f"{where}: {text_field!r} is {kind}, not text; the keys are {keys}: correct it or set text_field")


# --- other sources ----------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> Iterator[str]:
    yield _decoded(b"".join(read_blocks(path)), str(path))


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_field not in names:
                columns = ", ".join(map(repr, names))
                near = did_you_mean(text_field, names)
                raise DataError(f"{path}: no column {text_field!r}{near}; its columns are {columns}: set text_field")
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    text = value.as_py()
                    # Some writers declare columns of text as bytes.
                    text = text.decode() if isinstance(text, bytes) else text
                    yield _text_field({text_field: text}, f"{path}: row {row}", text_field)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: row {row}: not UTF-8 ({error}): convert the text to UTF-8") from None
    except pyarrow.ArrowNotImplementedError as error:
        raise DataError(
            f"{path}: of a kind that pyarrow {pyarrow.__version__} cannot read ({error}): write it otherwise"
        ) from None
    except (PermissionError, FileNotFoundError) as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}: correct its permissions or path") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole parquet file ({error}): copy or write it again") from None


def _read_hub(entry: str, text_field: str) -> Iterator[str]:
    for number, example in enumerate(_hub_examples(entry), start=1):
        yield _text_field(example, f"{entry}: example {number}", text_field)


def _hub_examples(entry: str) -> Iterator[dict[str, Any]]:
    name, config, split = [*entry.removeprefix(HUB).split(":", 2), "", ""][:3]
    try:
        datasets = import_package("datasets")
    except ImportError as error:
        raise MachineError(f"{entry}: {error}: pip install 'megatron_specialm[hub]', or name files instead") from None
    try:
        yield from datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the hub's client raises the errors of its HTTP library
        raise MachineError(
            f"{entry}: the hub cannot be reached or has no such dataset ({type(error).__name__}: {error}): "
            "check the name and the network, or download it and name its files"
        ) from None
