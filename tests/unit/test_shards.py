"""A set of text in shards: its tasks, their digests, and that what they make together is what one task makes."""

import json
import os
from pathlib import Path

import pytest

from megatron_specialm.base.artifacts import begin_artifact
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import ConfigError, DataError
from megatron_specialm.config.graph import Shard, TaskId, build_graph
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.config.schema import Pipeline, TokenizeStage
from megatron_specialm.data.documents import shard_files
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import train_sentencepiece
from megatron_specialm.launch import hashes
from megatron_specialm.launch.plan import make_plan
from megatron_specialm.stages import tokenize
from megatron_specialm.stages.context import Context

FILES, DOCUMENTS = 7, 30  # documents of a file
SHARDS = ["generic.00000", "generic.00001", "generic.00002"]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with seven files of the generic set, and a domain's."""
    monkeypatch.chdir(tmp_path)
    for name in (*(f"generic.{number}" for number in range(FILES)), "held-out", "law"):
        lines = [
            {"text": f"Number {number} of {name}: a model was small, and it was cheap."} for number in range(DOCUMENTS)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"Number {number} of generic: a model was small, and it was cheap." for number in range(200)]
    train_sentencepiece(texts, folder, vocabulary_size=300, algorithm="bpe", sample_characters=10_000)
    return folder


def _page(root: Path, *, shards: int = 1, **files: object) -> Pipeline:
    generic = {"train": "generic.?.jsonl", "test": "law.jsonl", "shards": shards, **files}
    return Pipeline.model_validate(
        {
            "name": "shards",
            "root": str(root),
            "text": {"generic": generic, "domains": {"law": {"train": "law.jsonl", "test": "law.jsonl"}}},
            "stages": {
                "tokenizer": {"kind": "tokenizer"},
                "tokens": {"kind": "tokenize", "tokenizer": "tokenizer", "context_length": 16},
                "vectors": {"kind": "embed", "tokens": "tokens", "encoder": {"kind": "tfidf", "dimensions": 8}},
                "clusters": {"kind": "cluster", "vectors": "vectors", "k": 4},
                "assignment": {"kind": "assign", "clusters": "clusters", "vectors": "vectors"},
            },
        }
    )


def test_each_shard_is_a_task_and_the_sets_own_task_gathers_them(text: Path) -> None:
    graph = build_graph(_page(text, shards=3))
    assert [name.key for name in graph if name.stage == "tokens"] == [*SHARDS, "generic", "law"]
    for number, key in enumerate(SHARDS):
        task = graph[TaskId("tokens", key)]
        assert (task.shard, task.domain, task.inputs) == (Shard(number, 3), None, (TaskId("tokenizer", "generic"),))
    gather = graph[TaskId("tokens", "generic")]
    assert gather.inputs == (TaskId("tokenizer", "generic"), *(TaskId("tokens", key) for key in SHARDS))
    assert gather.files == ("law.jsonl",), "the training files are the shards'"


def test_a_shard_is_a_range_of_the_files(text: Path) -> None:
    ranges = [shard_files(["generic.?.jsonl"], number, 3) for number in range(3)]
    assert [len(files) for files in ranges] == [2, 2, 3]
    assert [file for files in ranges for file in files] == [Path(f"generic.{number}.jsonl") for number in range(FILES)]


def test_more_shards_than_files_are_refused(text: Path) -> None:
    with pytest.raises(DataError, match=r"8 shards of the 7 files behind generic.*: set `shards` to 7 or fewer"):
        make_plan(_page(text, shards=8), text / "run")


def test_shards_of_a_set_that_is_cut_by_tokens_are_refused(text: Path) -> None:
    smoke = Path(__file__).parents[2] / "configs" / "pipelines" / "smoke.yaml"
    with pytest.raises(ConfigError, match=r"text\.domains\.torch.*`shards: 2` with `train_tokens: 50`"):
        load_pipeline(smoke, ["text.domains.torch.shards=2", "text.domains.torch.train_tokens=50"])


def _digests(pipeline: Pipeline, root: Path) -> dict[str, str]:
    return {name.key: planned.digest for name, planned in make_plan(pipeline, root).items() if name.stage == "tokens"}


def test_one_shard_is_the_set_as_it_was(text: Path) -> None:
    assert _digests(_page(text), text / "run") == _digests(_page(text, shards=1), text / "run")


def test_a_shards_digest_is_of_its_own_files(text: Path) -> None:
    page = _page(text, shards=3)
    page = page.model_copy(update={"stages": {**page.stages, "tokenizer": page.stages["tokenizer"].model_copy(
        update={"path": str(text / "law.jsonl")})}})  # fmt: skip  # a tokenizer that the generic text does not decide
    before = _digests(page, text / "run")
    (text / "generic.2.jsonl").write_text(json.dumps({"text": "something else"}) + "\n")
    after = _digests(page, text / "run")
    assert {key for key in before if before[key] != after[key]} == {"generic.00001", "generic"}


def test_a_changed_file_is_read_again_alone(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, read = _page(text, shards=3), []
    make_plan(page, text / "run")
    real = hashes.sha256_file
    monkeypatch.setattr(hashes, "sha256_file", lambda file: read.append(file.name) or real(file))
    (text / "generic.5.jsonl").write_text(json.dumps({"text": "something else"}) + "\n")
    make_plan(page, text / "run")
    assert read == ["generic.5.jsonl"]
    os.utime(text / "generic.1.jsonl", ns=(1, 1))
    make_plan(page, text / "run")
    assert read[1:] == ["generic.1.jsonl"]


def _tokenize(page: Pipeline, root: Path, tokenizer: Path) -> Path:
    """Run the tokenize tasks of the generic set; returns the set's own folder."""
    (root / "tokenizer").mkdir(parents=True)
    (root / "tokenizer" / "generic").symlink_to(tokenizer)
    stage = page.stages["tokens"]
    assert isinstance(stage, TokenizeStage)
    for task in build_graph(page).values():
        if task.id.stage == "tokens" and task.id.key != "law":
            folder = begin_artifact(root, *task.id, digest="t")
            tokenize.run(stage, Context(page, task, root, folder, ALONE, threads=1))
    return root / "tokens" / "generic"


def _windows(folder: Path, split: str) -> list[list[int]]:
    store = TokenStore.open(folder, split)
    return [store.window(index).tolist() for index in range(len(store))]


def test_shards_hold_the_windows_of_the_whole_set_in_its_order(text: Path, tokenizer: Path) -> None:
    held_out = {"validation": "held-out.jsonl"}
    whole = _tokenize(_page(text, **held_out), text / "whole", tokenizer)
    sharded = _tokenize(_page(text, shards=3, **held_out), text / "sharded", tokenizer)
    for split in ("train", "validation", "test"):
        assert _windows(sharded, split) == _windows(whole, split)


def test_each_shard_holds_out_its_own_documents(text: Path, tokenizer: Path) -> None:
    sharded = _tokenize(_page(text, shards=3), text / "sharded", tokenizer)
    whole = _tokenize(_page(text), text / "whole", tokenizer)
    train, validation = _windows(sharded, "train"), _windows(sharded, "validation")
    assert sorted(train + validation) == sorted(_windows(whole, "train") + _windows(whole, "validation"))
    counts = [json.loads((text / "sharded/tokens" / key / "store.json").read_text())["splits"] for key in SHARDS]
    assert [split["validation"]["documents"] for split in counts] == [6, 6, 9], "a tenth of 2, 2 and 3 files"
    assert [set(split) for split in counts] == [{"train", "validation"}] * 3
    store = json.loads((sharded / "store.json").read_text())["splits"]
    assert store["train"]["documents"] == FILES * DOCUMENTS - 21
    assert not list(sharded.glob("train.*")), "no token is copied"
