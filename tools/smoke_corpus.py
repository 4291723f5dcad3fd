"""Real text that every machine with our dependencies already has: the docstrings of installed packages.

    python tools/smoke_corpus.py [--output data/smoke]

Writes `generic` and the domains `scipy`, `sklearn` and `torch`, train and test, as jsonl. A few hundred kilobytes, for
`configs/pipelines/smoke.yaml`. No package is imported: the sources are parsed.
"""

import argparse
import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_specialm.base.files import write_text

DOMAINS = ("scipy", "sklearn", "torch")
GENERIC = ("numpy", "transformers", *DOMAINS)
TRAIN_CHARACTERS, TEST_CHARACTERS, GENERIC_CHARACTERS = 60_000, 30_000, 1_500_000


def docstrings(package: str) -> Iterator[str]:
    """The docstrings of a package's modules, classes and functions of at least 200 characters, in file order."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is a dependency of this project"
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        if not {"tests", "test", "testing"}.isdisjoint(path.parts) or "_test" in path.name:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 200:
                    yield text


def take(texts: Iterator[str], characters: int, seen: set[str]) -> list[str]:
    """The next texts that are not in `seen`, up to a number of characters."""
    taken: list[str] = []
    for text in texts:
        if text not in seen:
            seen.add(text)
            taken.append(text)
            characters -= len(text)
        if characters <= 0:
            break
    return taken


def main() -> None:
    """Write all sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/smoke"))
    folder = parser.parse_args().output
    readers = {package: docstrings(package) for package in GENERIC}
    seen: set[str] = set()
    sets: dict[str, list[str]] = {}
    for domain in DOMAINS:
        sets[f"{domain}.test"] = take(readers[domain], TEST_CHARACTERS, seen)
        sets[f"{domain}.train"] = take(readers[domain], TRAIN_CHARACTERS, seen)
    share = GENERIC_CHARACTERS // len(GENERIC)
    sets["generic.test"] = [text for package in GENERIC for text in take(readers[package], TEST_CHARACTERS // 5, seen)]
    sets["generic.train"] = [text for package in GENERIC for text in take(readers[package], share, seen)]
    for name, texts in sets.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(f"{name}: {len(texts)} documents, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
