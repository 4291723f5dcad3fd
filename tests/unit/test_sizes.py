"""Sizes of a domain: on the config, in digests, and in the token store."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from megatron_specialm.base import process_status as counting
from megatron_specialm.base.artifacts import Report, begin_artifact
from megatron_specialm.base.errors import ConfigError, DataError
from megatron_specialm.config.load import configs_folder, dump_pipeline, load_pipeline
from megatron_specialm.config.schema import Pipeline, TokenizeStage
from megatron_specialm.config.text import TextSet, ValidationFloor, size_name
from megatron_specialm.data.splits import cut_training_set
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer_making import train_sentencepiece
from megatron_specialm.engine.protocol import LossSum
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.digests import digest
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.stages import tokenize
from megatron_specialm.stages.evaluate import text_scored
from tests.contexts import make_context

SMOKE = configs_folder() / "pipelines" / "smoke.yaml"
SIZES = "text.domains.torch.sizes=[50_000, 1_000_000, 1234]"
T = 8  # context length


def test_a_domain_with_sizes_is_a_domain_per_size() -> None:
    domains = load_pipeline(SMOKE, [SIZES]).text.domains
    assert list(domains) == ["scipy", "sklearn", "torch-50k", "torch-1m", "torch-1234"]
    assert [files.train_tokens for files in domains.values()] == [None, None, 50_000, 1_000_000, 1234]
    assert [files.domain for files in domains.values()] == [None, None, "torch", "torch", "torch"]
    assert len({tuple(files.test) for name, files in domains.items() if name.startswith("torch")}) == 1


def test_a_resolved_config_loads_as_it_is(tmp_path: Path) -> None:
    pipeline = load_pipeline(SMOKE, [SIZES])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_pipeline(pipeline))
    assert load_pipeline(resolved) == pipeline


def test_names_of_sizes_are_exact() -> None:
    assert [size_name(size) for size in (1, 999, 1_000, 1_500, 50_000, 1_500_000, 64_000_000)] == [
        "1", "999", "1k", "1500", "50k", "1500k", "64m",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("text.domains.torch.sizes=[]", r"domains\.torch\.sizes: \[\]: give different numbers"),
        ("text.domains.torch.sizes=50_000", r"domains\.torch\.sizes: 50000: give different numbers"),
        ("text.domains.torch.sizes=[5, 5]", r"domains\.torch\.sizes: \[5, 5\]: give different numbers"),
        ("text.domains.torch.sizes=[0]", r"domains\.torch\.sizes: \[0\]: give different numbers"),
        ("text.domains.torch.sizes=[true]", r"domains\.torch\.sizes: \[True\]: give different numbers"),
        ("text.domains.torch={train: a, test: b, sizes: [5], train_tokens: 5}", "neither `train_tokens` nor `domain`"),
        ("text.domains={a: {train: a, test: b, sizes: [5]}, a-5: {train: a, test: b}}", "'a-5' is there twice"),
        ("text.domains={a-5: {train: a, test: b}, a: {train: a, test: b, sizes: [5]}}", "'a-5' is there twice"),
        ("text.domains.generic={train: a, test: b, sizes: [5]}", "'generic' is taken"),
        ("text.domains.torch.sizs=[5]", "sizs: unknown key; did you mean 'sizes'"),
        ("text.domains.torch={train: a, test: b, trian: c, sizes: [5]}", "trian: unknown key; did you mean 'train'"),
        (
            "text.domains.torch.validation_floor.document=5",
            "unknown key; did you mean 'documents'.*keys: documents, tokens",
        ),
        ("text.generic.sizes=[5]", r"text\.generic\.sizes: unknown key"),
    ],
)
def test_mistakes(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_pipeline(SMOKE, [override])


def _digests(pipeline: Pipeline) -> dict[TaskId, str]:
    digests: dict[TaskId, str] = {}
    for task in build_graph(pipeline).values():
        hashes = dict.fromkeys(task.files, "hash")
        digests[task.id] = digest(
            pipeline, task, inputs={name: digests[name] for name in task.inputs}, file_hashes=hashes
        )
    return digests


def test_a_size_changes_the_digests_of_its_own_domain_alone() -> None:
    sized = "text.domains.torch.train_tokens"
    whole, small, large = (
        _digests(load_pipeline(SMOKE, overrides)) for overrides in ([], [f"{sized}=5000"], [f"{sized}=6000"])
    )
    changed = {name for name in whole if whole[name] != small[name]}
    assert TaskId("tokens", "torch") in changed
    assert all(name.key.rpartition(".")[2] in ("torch", "generic") for name in changed)
    assert not [name for name in changed if name.key.endswith("generic")], "nothing that serves all domains"
    assert small[TaskId("tokens", "torch")] != large[TaskId("tokens", "torch")]


# --- the token store --------------------------------------------------------------------------------------------------


def _cut(lengths: list[int], wanted: int) -> list[int]:
    """The lengths of the training documents that are kept, of documents of these lengths."""
    documents = [("train", np.arange(length)) for length in lengths]
    kept = list(cut_training_set(documents, wanted, context_length=T, name="torch", floor=None))
    assert all(np.array_equal(ids, np.arange(len(ids))) for _, ids in kept)
    return [len(ids) for _, ids in kept]


@pytest.mark.parametrize(
    ("lengths", "wanted", "kept"),
    [
        ([10, 10, 10], 30, [10, 10, 10]),  # just enough
        ([10, 10, 10], 29, [10, 10, 8]),
        ([10, 10, 3], 21, [10, 10]),  # no whole window of the third fits
        ([20, 10, 3], 17, [16]),  # the document that is cut is the last one
        ([3, 20], 3, [3]),
    ],
)
def test_the_first_whole_windows_are_kept(lengths: list[int], wanted: int, kept: list[int]) -> None:
    assert _cut(lengths, wanted) == kept
    assert sum(kept) <= wanted < sum(kept) + T


def test_nothing_behind_the_size_is_read_but_for_what_the_floor_takes() -> None:
    def cut(*splits: str, documents: int = 1, tokens: int = 1) -> tuple[list[tuple[str, int]], int]:
        floor, text = ValidationFloor(documents=documents, tokens=tokens), iter([(s, np.arange(20)) for s in splits])
        kept = cut_training_set(text, 16, context_length=T, name="torch", floor=floor)
        return [(split, len(ids)) for split, ids in kept], len(list(text))

    train, held_out = "train", "validation"
    kept, both = ("train", 16), ("validation", 20)
    assert cut(held_out, train, train, held_out) == ([both, kept], 2)
    assert cut(train, train, held_out, train) == ([kept, both], 1)
    for floor in ({"documents": 2}, {"tokens": 21}):
        assert cut(held_out, train, train, held_out, train, held_out, **floor) == ([both, kept, both], 2)
        assert cut(held_out, train, train, **floor) == ([both, kept], 0), "who validates says that it is too little"


def test_too_little_text_is_told() -> None:
    with pytest.raises(DataError, match=r"torch\.train_tokens: 31 wanted, .* hold 30 tokens"):
        _cut([10, 20], 31)


def test_a_size_that_leaves_no_window_is_told() -> None:
    with pytest.raises(DataError, match=rf"torch\.train_tokens: {T - 1} are less than a window of {T} tokens"):
        _cut([T, 20], T - 1)
    assert _cut([T - 1, 20], T - 1) == [T - 1]  # a document that is shorter is one


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(_documents(), folder, vocabulary_size=300, algorithm="bpe", sample_characters=100_000)
    return folder


def _documents() -> list[str]:
    return [f"Once upon a time there was a model, number {number}, and it was small." for number in range(100)]


FLOOR = ValidationFloor(documents=2, tokens=10)  # of the hundred documents about three in the size below are drawn


def _tokenized(root: Path, tokenizer: Path, files: TextSet) -> tuple[Report, dict[str, TokenStore]]:
    """The token store of a domain whose training and test text are the same documents."""
    root.mkdir()
    (root / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in _documents()))
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "generic").symlink_to(tokenizer)
    pipeline = Pipeline.model_validate(
        {
            "name": "sizes",
            "root": str(root),
            "text": {"generic": {"train": "a", "test": "b"}, "domains": {"tales": files}},
            "stages": {
                "tokenizer": {"kind": "tokenizer"},
                "tokens": {"kind": "tokenize", "tokenizer": "tokenizer", "context_length": T},
            },
        }
    )
    task = build_graph(pipeline)[TaskId("tokens", "tales")]
    folder = begin_artifact(root, *task.id, digest="t")
    stage = pipeline.stages["tokens"]
    assert isinstance(stage, TokenizeStage)
    report = tokenize.run(stage, make_context(pipeline, task, root, folder))
    return report, {split: TokenStore.open(folder, split) for split in ("train", "validation", "test")}


def _windows(store: TokenStore) -> list[list[int]]:
    return [store.window(index).tolist() for index in range(len(store))]


def test_tokenizing_says_how_far_it_is(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(counting, "COUNT_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    root = tmp_path / "whole"
    _tokenized(root, tokenizer, TextSet(train=[str(root / "train.jsonl")], test=[str(root / "train.jsonl")]))
    told = f": {sum(map(len, _documents())):,} characters, "
    assert caplog.text.count(told) == 2, "the training and the test documents"
    assert not list(tmp_path.rglob(counting.PROGRESS))


def test_a_size_is_the_beginning_of_the_set(tmp_path: Path, tokenizer: Path) -> None:
    reports, stores = {}, {}
    for wanted in (None, 400):
        root = tmp_path / str(wanted)
        files = TextSet(
            train=[str(root / "train.jsonl")],
            test=[str(root / "train.jsonl")],
            train_tokens=wanted,
            validation_floor=FLOOR,
        )
        reports[wanted], stores[wanted] = _tokenized(root, tokenizer, files)
    whole, small = stores[None], stores[400]
    assert 400 - T < small["train"].tokens <= 400 < whole["train"].tokens
    assert reports[400].values["tokens"]["train"] == small["train"].tokens
    for index in range(len(small["train"])):
        np.testing.assert_array_equal(small["train"].window(index), whole["train"].window(index))
    assert _windows(small["test"]) == _windows(whole["test"])
    held_out = len(small["validation"])  # what stands among the documents that were read
    assert 0 < held_out < len(whole["validation"]) / 2
    assert _windows(small["validation"]) == _windows(whole["validation"])[:held_out]


def test_a_store_knows_the_bytes_of_the_text_that_models_are_scored_on(tmp_path: Path, tokenizer: Path) -> None:
    root = tmp_path / "whole"
    _, stores = _tokenized(
        root, tokenizer, TextSet(train=[str(root / "train.jsonl")], test=[str(root / "train.jsonl")])
    )
    test, written = stores["test"], sum(len(text.encode()) for text in _documents())
    assert test.text_bytes == written and stores["train"].text_bytes is None
    assert text_scored(test, LossSum(7.0, test.tokens)) == {"nats": 7.0, "bytes": written, "bytes_estimated": False}
    some = text_scored(test, LossSum(7.0, test.tokens // 4))
    assert some["bytes_estimated"] and some["bytes"] == pytest.approx(written / 4, rel=0.01)
    description = test.folder / "store.json"
    content = json.loads(description.read_text())
    del content["splits"]["test"]["text_bytes"]  # as earlier versions wrote it
    description.write_text(json.dumps(content))
    assert text_scored(TokenStore.open(test.folder, "test"), LossSum(7.0, test.tokens)) == {}
