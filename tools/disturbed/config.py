"""A small config with every kind of stage except `import`, and its text."""

import json
import random
from pathlib import Path

SETS = {"generic": ("ka lo mi ter son vel dra pin", 160), "law": ("osk ume fri gat bel nor quo ris", 60)}
TOPICS = 3  # of the generic set, the last of which is the domain's: so many clusters have something to find


def write_config(folder: Path, *, steps: int, every: int) -> None:
    """Write `config.yaml` and its text into `folder`.

    Args:
        steps: of each training.
        every: steps between checkpoints, and between validations.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = Path(__file__).with_name("config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(
        config.replace("STEPS", str(steps)).replace("EVERY", str(every)), encoding="utf-8"
    )
    for name, (_, documents) in SETS.items():
        for split, count in (("train", documents), ("test", documents // 8)):
            generator = random.Random(f"{name} {split}")
            texts = (_document(generator, _topic(name, number)) for number in range(count))
            (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def _topic(name: str, number: int) -> list[str]:
    """The vocabulary of a document: the domain's, or one of the generic set's topics in turn."""
    generic, domain = (syllables.split() for syllables, _ in SETS.values())
    topics = [generic[:4], generic[4:], domain]
    assert len(topics) == TOPICS
    syllables = domain if name == "law" else topics[number % TOPICS]
    return [first + second for first in syllables for second in [*syllables, ""]]


def _document(generator: random.Random, words: list[str]) -> str:
    return " ".join(generator.choices(words, k=generator.randint(40, 80))) + "."
