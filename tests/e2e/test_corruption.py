"""Every kind of file of a run, damaged in every way, before whatever reads it: it is noticed, and the file is named.

One flipped bit, half of the file, none of it, no file, and one more file beside it. A reader that comes to the same
nevertheless must not have opened the file: an extra one that nobody asked for, or what a command does without.
"""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest

from megatron_specialm.base.artifacts import LABEL, MARKER
from megatron_specialm.base.integrity import RECORDS
from megatron_specialm.run.processes import limit_threads
from tests.commands import succeed
from tests.damage import Damage, Finished, Verdict
from tools.disturbed.config import write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLAN, VERIFY, RESULTS = "plan config.yaml", "verify run --deep", "results config.yaml"
# What reads an artifact: commands, and tasks, one of each kind of stage that opens it.
READERS = {
    "tokenizer/generic": ["tokens/law", "vectors/law", "export/tuned.law", "generate run/tuned/law osk --tokens 4"],
    "tokens/generic": ["slm/generic", "vectors/generic", "perplexity/slm.generic"],
    "tokens/law": ["tuned/law", "taught/law", "slm-pn-chosen/law", "perplexity/tuned.law", "export/tuned.law"],
    "vectors/generic.encoder": ["vectors/law"],
    "vectors/generic": ["clusters/generic", "assignment/generic"],
    "vectors/law": ["assignment/law"],
    "clusters/generic": ["assignment/law", "slm-mix/c0"],
    "assignment/generic": ["slm-is/law", "slm-pn/generic", "slm-mix/c0"],
    "assignment/law": ["slm-is/law", "slm-mix-chosen/law", "slm-pn-chosen/law"],
    "slm/generic": ["tuned/law", "perplexity/slm.generic", "generate run/slm/generic osk --tokens 4"],
    "slm-mix/c0": ["slm-mix-chosen/law"],
    "slm-pn/generic": ["slm-pn-chosen/law"],
    "slm-mix-chosen/law": ["mix-tuned/law", "perplexity/slm-mix-chosen.law"],
    "tuned/law": ["taught/law", "export/tuned.law", "generate run/tuned/law osk --tokens 4"],
    "rates/law.rate-0.002": ["rates/law"],
    "taught/law": ["distilled/law"],
    "perplexity/tuned.law": [RESULTS],
    "export/tuned.law": ["generate run/export/tuned.law osk --tokens 4"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A run of a config with all kinds of stages, and trainings of ten steps."""
    folder = tmp_path_factory.mktemp("finished")
    write_config(folder, steps=10, every=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        limit_threads(1)
        succeed(folder, "run", "config.yaml")
        yield Finished(folder, scratch=folder / "scratch")


def cells(finished: Finished, artifact: str) -> Iterator[tuple[list[Path], Damage, str]]:
    """All damages of all files of an artifact, before each of its readers. Extra files are put beside all at once: a reader is
    to open none of them."""
    files = finished.files(artifact)
    for reader in (*READERS[artifact], PLAN):
        yield files, "extra", reader
        for path in files:
            for damage in _damages(path, reader, is_first=reader == READERS[artifact][0]):
                yield [path], damage, reader


def _damages(path: Path, reader: str, *, is_first: bool) -> tuple[Damage, ...]:
    """The plan reads markers, and of other files the size. All tasks check what they read in one place: the first one is tried
    with every damage, the others with one that no size tells."""
    if not is_first and reader != PLAN:
        return ("flip",)
    return ("cut", "empty", "delete") if reader == PLAN and path.name != MARKER else ("flip", "cut", "empty", "delete")


def verified(finished: Finished) -> Iterator[tuple[list[Path], Damage]]:
    """All damages of all files before `verify`, which reads all there is and names a damaged file of each artifact: at once the
    first files of all artifacts, then the second ones, and so on."""
    files = [finished.files(artifact) for artifact in READERS]
    yield [path for own in files for path in own], "extra"
    for row in zip_longest(*files):
        for damage in ("flip", "delete"):
            yield [path for path in row if path], damage


@pytest.mark.parametrize("artifact", READERS)
def test_damage_is_noticed_by_name(finished: Finished, artifact: str) -> None:
    wrong = []
    for paths, damage, reader in cells(finished, artifact):
        verdict, said = finished.judge(paths, damage, reader)
        if not is_right(verdict, said, paths, damage, reader):
            wrong.append(f"{damage} of {', '.join(map(str, paths))} before {reader}: {verdict}: {said[:300]}")
    assert not wrong, "\n".join(wrong)


def test_verify_names_all_that_is_damaged(finished: Finished) -> None:
    assert "0 damaged" in str(finished.read(VERIFY))
    wrong = []
    for paths, damage in verified(finished):
        verdicts, said = finished.judge_each(paths, damage, VERIFY)
        wrong += [
            f"{damage} of {path}: {verdict}: {said}"
            for path, verdict in verdicts.items()
            if not is_right(verdict, said, [path], damage, VERIFY)
        ]
        findings = [line for line in said.splitlines() if line.startswith(("damaged:", "unfinished:", "unlisted:"))]
        if len(findings) != list(verdicts.values()).count("noticed"):
            wrong.append(f"{damage} of {', '.join(map(str, paths))}: something else is named: {said}")
    assert not wrong, "\n".join(wrong)


def is_right(verdict: Verdict, said: str, paths: list[Path], damage: Damage, reader: str) -> bool:
    """Whether a reader may leave it at that. Where a marker is gone, the task is not finished: the plan has it to do, results
    leave it out. Labels are for who makes an artifact, and for `verify`; commands read only some of the files."""
    if verdict == "other":
        gone = paths[0].name == MARKER and damage == "delete" and reader in (PLAN, RESULTS)
        return gone or (reader == PLAN and "damaged" in said)
    if paths[0].name in RECORDS:
        return verdict in ("noticed", "harmless")
    may_be_unread = damage == "extra" or paths[0].name == LABEL or not ("/" in reader.split()[0] or reader == PLAN)
    return verdict == "noticed" or (verdict == "harmless" and may_be_unread and reader != VERIFY)


def test_all_kinds_are_tried(finished: Finished) -> None:
    """Each kind of stage is damaged, and at least 250 cells are looked at."""
    kinds = {finished.pipeline.stages[artifact.partition("/")[0]].kind for artifact in READERS}
    assert kinds == {stage.kind for stage in finished.pipeline.stages.values()}
    tried = sum(len(paths) for artifact in READERS for paths, _, _ in cells(finished, artifact))
    assert tried + sum(len(paths) for paths, _ in verified(finished)) >= 250
