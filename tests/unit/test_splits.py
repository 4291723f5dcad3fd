"""What is held out for validation: of large sets a fraction, of small ones enough to validate on, or an error."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_specialm.base.artifacts import Cost, Marker, Report, begin_artifact, finish_artifact
from megatron_specialm.base.errors import DataError
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import ValidationFloor
from megatron_specialm.data.splits import cut_training_set, hold_out
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import train_sentencepiece
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.plan import make_plan
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.graph.validation import validating_stages
from megatron_specialm.run.preflight import refuse_too_few_documents, refuse_too_little_held_out
from megatron_specialm.stages import tokenize
from tests.contexts import make_context

T = 16  # context length
FLOOR = ValidationFloor()


def _held_out(
    lengths: Sequence[int], *, floor: ValidationFloor = FLOOR, fraction: float = 0.1, seed: int = 0
) -> list[int]:
    """The numbers of the documents that are held out, of so many with these lengths. All come, in their order."""
    documents = [np.full(length, number) for number, length in enumerate(lengths)]
    assigned = list(hold_out(documents, fraction=fraction, floor=floor, seed=seed, context_length=T))
    assert [int(ids[0]) for _, ids in assigned] == list(range(len(lengths)))
    assert [len(ids) for _, ids in assigned] == list(lengths)
    return [int(ids[0]) for split, ids in assigned if split == "validation"]


def _of_each_block(count: int, every: int, seed: int) -> list[int]:
    """The draws of a set that the floor does not touch."""
    digests = [hashlib.sha256(f"{seed}/{block}".encode()).digest()[:8] for block in range(-(-count // every))]
    numbers = [block * every + int.from_bytes(digest) % every for block, digest in enumerate(digests)]
    return [number for number in numbers if number < count]


@pytest.mark.parametrize(
    ("count", "length", "fraction"), [(500, 200, 0.1), (500, 60, 0.1), (3000, 30, 0.05), (47, 900, 0.1)]
)
@pytest.mark.parametrize("seed", range(3))
def test_of_a_large_set_one_of_so_many_in_a_row_is_held_out(
    count: int, length: int, fraction: float, seed: int
) -> None:
    expected = _of_each_block(count, round(1 / fraction), seed)
    assert _held_out([length] * count, fraction=fraction, seed=seed) == expected
    assert len(expected) * length >= FLOOR.tokens, "the test is of sets that meet the floor so"


def test_no_more_of_a_large_set_is_in_memory_than_it_takes_to_meet_the_floor() -> None:
    read = 0

    def documents() -> Any:
        nonlocal read
        for _ in range(10_000):
            read += 1
            yield np.zeros(500, int)

    assigned = hold_out(documents(), fraction=0.1, floor=FLOOR, seed=0, context_length=T)
    next(assigned)
    assert read == 40
    for _ in range(5_000):
        next(assigned)
    assert read < 5_100


SMALL = [
    [186] * 58,  # a tenth are 6 documents of 1,116 tokens
    [600] * 10,
    [50] * 90,
    [1000] * 8,
    [9000, *[400] * 20],
    [30] * 200 + [2500] * 3,
    [9000, 10_000, *[300] * 6],  # four documents of 2,000 tokens are there with one of the long ones alone
    [1500] * 3 + [20] * 97,
]


@pytest.mark.parametrize("lengths", SMALL)
@pytest.mark.parametrize("seed", range(5))
def test_of_a_small_set_as_much_is_held_out_as_the_floor_says(lengths: list[int], seed: int) -> None:
    held_out = _held_out(lengths, seed=seed)
    tokens = sum(lengths[number] for number in held_out)
    assert FLOOR.is_met(len(held_out), tokens)
    assert len(held_out) <= len(lengths) // 2 and tokens <= sum(lengths) // 2
    # Without the last one that was taken it would be too little: no more is taken than is needed.
    assert any(not FLOOR.is_met(len(held_out) - 1, tokens - lengths[number]) for number in held_out)
    assert _held_out(lengths, seed=seed) == held_out, "by the seed"


def test_which_documents_of_a_small_set_follows_from_the_seed() -> None:
    assert len({tuple(_held_out([186] * 58, seed=seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("lengths", [[900] * 3, [5000] * 7, [20] * 150, [3000, 900]])
def test_of_a_set_that_is_too_small_no_more_than_the_fraction_is_held_out(lengths: list[int]) -> None:
    """Whether it may be so is asked where somebody validates on it."""
    expected = [number for number in _of_each_block(len(lengths), 10, 0) if len(lengths) >= 10]
    held_out = _held_out(lengths)
    assert held_out == expected if expected else len(held_out) == 1


@pytest.mark.parametrize(
    ("tokens", "floor", "held_out"),
    [
        (10_000, 2_000, 2_000),  # 125 of 625 windows
        (10_001, 2_000, 2_001),  # the last window has one token
        (50_000, 2_000, 4_992),  # a tenth of 3,125 windows is more
        (4_000, 2_000, 2_000),
        (3_999, 2_000, 399),  # more than half would have to be: a tenth, as always
        (17, 1, 1),
        (16, 1, 0),  # a single window
        (16, 2_000, 0),
    ],
)
def test_of_a_single_document_the_last_windows_are_held_out(tokens: int, floor: int, held_out: int) -> None:
    document = np.arange(tokens)
    parts = list(
        hold_out([document], fraction=0.1, floor=ValidationFloor(documents=1, tokens=floor), seed=0, context_length=T)
    )
    assert [split for split, _ in parts] == ["train", "validation"][: len(parts)]
    np.testing.assert_array_equal(np.concatenate([ids for _, ids in parts]), document)
    assert sum(len(ids) for split, ids in parts if split == "validation") == held_out
    assert len(parts[0][1]) % T == 0


@pytest.mark.parametrize("size", [5_000, 10_000])
def test_a_size_of_a_set_validates_on_as_much_and_is_the_beginning_of_a_larger_one(size: int) -> None:
    """The fault: of 10,000 tokens in documents of about 186 a single one was held out."""
    lengths = np.random.default_rng(0).integers(100, 272, size=400)
    documents = [np.full(length, number) for number, length in enumerate(lengths)]

    def cut(wanted: int) -> dict[str, list[np.ndarray]]:
        assigned = hold_out(documents, fraction=0.02, floor=FLOOR, seed=0, context_length=T)
        kept = list(cut_training_set(assigned, wanted, context_length=T, name="law", floor=FLOOR))
        return {part: [ids for split, ids in kept if split == part] for part in ("train", "validation")}

    small, large = cut(size), cut(20_000)
    assert FLOOR.is_met(len(small["validation"]), sum(map(len, small["validation"])))
    assert size - T < sum(map(len, small["train"])) <= size
    a, b = (np.concatenate(one["train"]) for one in (small, large))
    np.testing.assert_array_equal(a, b[: len(a)])


# --- who validates, and what it is told ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(_texts(200), folder, vocabulary_size=300, algorithm="bpe", sample_characters=100_000)
    return folder


def _texts(count: int, *, words: int = 20) -> list[str]:
    generator = np.random.default_rng(count)
    return [" ".join(f"word{number}" for number in generator.integers(0, 30, words)) for _ in range(count)]


def _write(path: Path, texts: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


EARLY: dict[str, Any] = {"early_stopping": {"evaluate_every": 2}}
TRAIN: dict[str, Any] = {
    "kind": "train",
    "tokens": "tokens",
    "steps": 4,
    "global_batch_size": 8,
    "schedule": {"warmup_steps": 0},
}
MODEL: dict[str, Any] = {
    "model": {"layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "attention_heads": 2}
}  # fmt: skip


def _config(root: Path, stages: dict[str, Any], **law: Any) -> Pipeline:
    """A config with a generic set of 400 documents of about 50 tokens, and a domain of the files that are given."""
    root.mkdir(exist_ok=True)
    generic, test = _write(root / "generic.jsonl", _texts(400)), _write(root / "test.jsonl", _texts(5))
    return Pipeline.model_validate(
        {
            "name": "floor",
            "root": str(root / "run"),
            "text": {
                "generic": {"train": generic, "test": test},
                "domains": {"law": {"train": generic, "test": test, **law}},
            },
            "stages": {
                "tokenizer": {"kind": "tokenizer"},
                "tokens": {"kind": "tokenize", "tokenizer": "tokenizer", "context_length": T},
                **stages,
            },
        }
    )


PLAIN = {"slm": {**TRAIN, **MODEL, "data": "generic"}}
TUNED = {**PLAIN, "tuned": {**TRAIN, "data": "domain", "init": "slm", **EARLY}}


def _tokenized(config: Pipeline, tokenizer: Path, key: str = "law", *, digest: str = "t") -> Report:
    """The tokenize tasks of a set, its shards' first; what the set's own reports."""
    root = Path(config.root)
    (root / "tokenizer").mkdir(parents=True, exist_ok=True)
    if not (root / "tokenizer" / "generic").exists():
        (root / "tokenizer" / "generic").symlink_to(tokenizer)
    for task in build_graph(config).values():
        if task.id.stage == "tokens" and task.id.key.partition(".")[0] == key:
            folder = begin_artifact(root, *task.id, digest=digest)
            report = tokenize.run(config.stages["tokens"], make_context(config, task, root, folder))
    return report


def test_the_stages_that_validate_on_a_set(tmp_path: Path) -> None:
    clusters = {
        "vectors": {"kind": "embed", "tokens": "tokens", "encoder": {"kind": "tfidf", "dimensions": 4}},
        "clusters": {"kind": "cluster", "vectors": "vectors", "k": 2},
        "assignment": {"kind": "assign", "clusters": "clusters", "vectors": "vectors"},
        "mix": {**TRAIN, **MODEL, "data": "cluster", "assignment": "assignment", **EARLY},
        "chosen": {"kind": "select", "experts": "mix", "tokens": "tokens"},
        "tried": {
            "kind": "select", "experts": "mix", "tokens": "tokens", "compare": ["halving"],
            "trial": {"steps": 3, "global_batch_size": 4},
        },
    }  # fmt: skip
    config = _config(tmp_path / "all", {**TUNED, **clusters})
    assert validating_stages(config, "tokens", "generic") == ["mix"]
    assert validating_stages(config, "tokens", "law") == ["tuned", "tried"]
    early = {"early": {**TRAIN, **MODEL, "data": "generic", "domain_fraction": 0.2, **EARLY}}
    assert validating_stages(_config(tmp_path / "early", early), "tokens", "generic") == []
    assert validating_stages(_config(tmp_path / "early", early), "tokens", "law") == ["early"]


def test_a_set_that_is_too_small_is_refused_where_a_stage_validates_on_it(tmp_path: Path, tokenizer: Path) -> None:
    few = _write(tmp_path / "few.jsonl", _texts(20))
    for stages in ({}, PLAIN):
        report = _tokenized(_config(tmp_path / "plain", stages, train=few), tokenizer)
        assert report.values["documents"]["validation"] == 2, "one of each ten"
    says = (
        r"text\.domains\.law: 2 documents of \d+ tokens held out, beside 18 documents of \d+ tokens to train on; to validate "
        r"on them \(tuned\) takes at least 4 documents and 2,000 tokens \(`validation_floor`\), and at most half of a set is "
        r"held out: add documents, name `validation` files, or lower text\.domains\.law\.validation_floor"
    )
    with pytest.raises(DataError, match=says):
        _tokenized(_config(tmp_path / "tuned", TUNED, train=few), tokenizer)
    report = _tokenized(
        _config(tmp_path / "low", TUNED, train=few, validation_floor={"documents": 3, "tokens": 50}), tokenizer
    )
    assert report.values["documents"]["validation"] == 3
    _tokenized(_config(tmp_path / "tuned", TUNED, train=few), tokenizer, key="generic")  # nothing is wrong with it


def test_validation_files_that_are_too_small_are_named(tmp_path: Path, tokenizer: Path) -> None:
    one = _write(tmp_path / "one.jsonl", _texts(1))
    with pytest.raises(
        DataError, match=r"text\.domains\.law\.validation: .*one\.jsonl: 1 document of \d+ tokens; .*leave"
    ):
        _tokenized(_config(tmp_path / "tuned", TUNED, validation=one), tokenizer)
    enough = _write(tmp_path / "enough.jsonl", _texts(80))
    report = _tokenized(_config(tmp_path / "enough", TUNED, validation=enough), tokenizer)
    assert report.values["documents"] == {"train": 400, "validation": 80, "test": 5}


def test_a_single_document_is_validated_on_where_the_config_says_so(tmp_path: Path, tokenizer: Path) -> None:
    book = _write(tmp_path / "book.jsonl", [" ".join(_texts(400))])
    with pytest.raises(
        DataError, match=r"text\.domains\.law: 1 document of .* beside 1 document of .*at least 4 documents"
    ):
        _tokenized(_config(tmp_path / "tuned", TUNED, train=book), tokenizer)
    report = _tokenized(_config(tmp_path / "low", TUNED, train=book, validation_floor={"documents": 1}), tokenizer)
    assert report.values["documents"]["validation"] == 1 and report.values["tokens"]["validation"] >= 2_000
    line = _write(tmp_path / "line.jsonl", ["word1 word2"])
    assert _tokenized(_config(tmp_path / "plain", PLAIN, train=line), tokenizer).values["windows"]["validation"] == 0
    with pytest.raises(DataError, match=r"0 documents of 0 tokens held out"):
        _tokenized(_config(tmp_path / "line", TUNED, train=line, validation_floor={"documents": 1}), tokenizer)


def test_a_split_without_windows_is_a_store(tmp_path: Path, tokenizer: Path) -> None:
    line = _write(tmp_path / "line.jsonl", ["word1 word2"])
    config = _config(tmp_path / "plain", PLAIN, train=line)
    _tokenized(config, tokenizer)
    assert not len(TokenStore.open(Path(config.root) / "tokens" / "law", "validation"))


def test_what_is_given_to_validate_on_does_not_depend_on_the_floor(tmp_path: Path) -> None:
    """Lowering the floor, as the error says, makes nothing stale where it held nothing out."""
    given = _write(tmp_path / "given.jsonl", _texts(3))
    graphs = [
        build_graph(_config(tmp_path / str(floor), TUNED, validation=given, validation_floor={"documents": floor}))
        for floor in (1, 2)
    ]
    tasks = [graph[TaskId("tokens", "law")] for graph in graphs]
    assert tasks[0].elsewhere == tasks[1].elsewhere


def test_a_size_is_refused_where_the_text_ends_before_the_floor(tmp_path: Path, tokenizer: Path) -> None:
    few = _write(tmp_path / "few.jsonl", _texts(40))
    sized = {"train": few, "train_tokens": 500}
    assert _tokenized(_config(tmp_path / "plain", PLAIN, **sized), tokenizer).values["tokens"]["train"] <= 500
    with pytest.raises(
        DataError, match=r"text\.domains\.law: \d documents of .* held out.*at least 4 documents and 2,000"
    ):
        _tokenized(_config(tmp_path / "tuned", TUNED, **sized), tokenizer)
    report = _tokenized(_config(tmp_path / "all", TUNED, train_tokens=500), tokenizer)
    assert report.values["documents"]["validation"] >= 4 and report.values["tokens"]["validation"] >= 2_000
    assert 500 - T < report.values["tokens"]["train"] <= 500


def test_shards_meet_the_floor_together(tmp_path: Path, tokenizer: Path) -> None:
    texts = _texts(150)
    parts = [_write(tmp_path / f"part{n}.jsonl", texts[n * 50 : n * 50 + 50]) for n in range(3)]
    report = _tokenized(_config(tmp_path / "tuned", TUNED, train=parts, shards=3), tokenizer)
    assert report.values["documents"]["validation"] >= 4 and report.values["tokens"]["validation"] >= 2_000
    _write(tmp_path / "part1.jsonl", ["word1"])  # a shard of which nothing can be held out
    report = _tokenized(
        _config(tmp_path / "one", TUNED, train=parts, shards=3, validation_floor={"tokens": 400}), tokenizer
    )
    assert report.values["documents"]["validation"] >= 4 and report.values["tokens"]["validation"] >= 400
    with pytest.raises(DataError, match=r"at least 4 documents and 9,000 tokens.*set fewer `shards`, or lower"):
        _tokenized(
            _config(tmp_path / "high", TUNED, train=parts, shards=3, validation_floor={"tokens": 9_000}), tokenizer
        )


def test_a_config_is_checked_for_sets_with_too_few_documents(tmp_path: Path) -> None:
    few = _write(tmp_path / "few.jsonl", _texts(7))
    refuse_too_few_documents(_config(tmp_path / "plain", PLAIN, train=few))
    with pytest.raises(DataError, match=r"text\.domains\.law: 7 documents; to validate .* at most half of a set"):
        refuse_too_few_documents(_config(tmp_path / "tuned", TUNED, train=few))
    refuse_too_few_documents(_config(tmp_path / "low", TUNED, train=few, validation_floor={"documents": 3}))
    with pytest.raises(DataError, match=r"text\.domains\.law\.validation: .*one\.jsonl: 1 document; "):
        one = _write(tmp_path / "one.jsonl", _texts(1))
        refuse_too_few_documents(_config(tmp_path / "tuned", TUNED, validation=one))
    refuse_too_few_documents(_config(tmp_path / "low", TUNED, train=one, validation_floor={"documents": 1}))


def test_what_was_tokenized_for_a_config_without_early_stopping_is_checked_before_anything_runs(
    tmp_path: Path, tokenizer: Path
) -> None:
    few = _write(tmp_path / "few.jsonl", _texts(20))
    plain, tuned = (_config(tmp_path / "config", stages, train=few) for stages in (PLAIN, TUNED))
    root, plan = Path(plain.root), make_plan(plain, Path(plain.root))
    name, report = TaskId("tokens", "law"), _tokenized(plain, tokenizer, digest=plan[TaskId("tokens", "law")].digest)
    finish_artifact(root, *name, Marker(plan[name].digest, Cost(0, 0, 0.0, 0.0, "cpu", 1), report.values, {}))
    plan = make_plan(tuned, root)
    assert plan[name].state == "done", "what is held out does not follow from who validates"
    refuse_too_little_held_out(tuned, plan, root, stages=["slm"])
    with pytest.raises(DataError, match=r"text\.domains\.law: 2 documents .* \(tuned\) takes at least 4"):
        refuse_too_little_held_out(tuned, plan, root, stages=["slm", "tuned"])
