"""Text of invented words for the configs of tests."""

import json
from collections.abc import Iterable
from pathlib import Path

SMOKE_SETS = ("generic", "scipy", "sklearn", "torch")
WORDS = tuple(a + b + c for a in ("br", "d", "fl", "g", "kr", "l") for b in "aeiou" for c in ("n", "st", "rk"))


def write_documents(path: Path, texts: Iterable[str], *, field: str = "text") -> None:
    """Write a JSONL file, with the folder that it stands in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


def write_sets(folder: Path, *names: str, words: int) -> None:
    """Per set a `NAME.train.jsonl` of 40 documents and a `NAME.test.jsonl` of 4, each of so many words."""
    for number, name in enumerate(names):
        for split, documents in (("train", 40), ("test", 4)):
            numbers = range(1, documents + 1)
            texts = (" ".join(WORDS[(i * j * j + number) % len(WORDS)] for j in range(words)) for i in numbers)
            write_documents(folder / f"{name}.{split}.jsonl", texts)


def write_smoke_names(folder: Path) -> Path:
    """The files of the smoke config in a working directory, each with its name for text; the folder that they stand in."""
    place = folder / "data" / "smoke"
    for name in SMOKE_SETS:
        for split in ("train", "test"):
            write_documents(place / f"{name}.{split}.jsonl", [f"{name} {split}"])
    return place
