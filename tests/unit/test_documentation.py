"""The documentation names files and headings that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "slurm" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BESIDE = (ROOT, ROOT / "megatron_specialm", ROOT / "megatron_specialm" / "slurm", ROOT / "docs", ROOT / "tests")
SOURCE = r"(?<![\w/*])[\w./-]+\.(?:py|sh)\b"


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    return {_anchor(heading) for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)}


def _links() -> Iterator[tuple[Path, str]]:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not re.match(r"https?:", target):
                yield page, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_source_files_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(SOURCE, page.read_text()))
    packages = [path.parent for path in (ROOT / "megatron_specialm").rglob("__init__.py")]
    missing = {
        name for name in named if not any((folder / name).exists() for folder in (page.parent, *BESIDE, *packages))
    }
    assert not missing, f"{page.name} names {sorted(missing)}"


def test_links_lead_somewhere() -> None:
    broken = []
    for page, target in _links():
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
