"""A set of text in shards: its tasks, their digests, and that what they make together is what one task makes."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_specialm.base import hash_cache
from megatron_specialm.base.artifacts import begin_artifact
from megatron_specialm.base.errors import ArtifactError, ConfigError, DataError
from megatron_specialm.clustering.vectors import Vectors
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.data.documents import cut_in_shards
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import train_sentencepiece
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.plan import make_plan
from megatron_specialm.graph.tasks import Shard, TaskId
from megatron_specialm.stages import assign, cluster, embed, tokenize
from megatron_specialm.stages.tokenizer import beginnings
from tests.contexts import make_context

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


HELD_OUT = {"validation": "held-out.jsonl"}  # so that shards hold out no documents of their own


def _config(root: Path, *, shards: int = 1, **files: object) -> Pipeline:
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
    graph = build_graph(_config(text, shards=3))
    assert [name.key for name in graph if name.stage == "tokens"] == [*SHARDS, "generic", "law"]
    for number, key in enumerate(SHARDS):
        task = graph[TaskId("tokens", key)]
        assert (task.shard, task.domain, task.inputs) == (Shard(number, 3), None, (TaskId("tokenizer", "generic"),))
    gather = graph[TaskId("tokens", "generic")]
    assert gather.inputs == (TaskId("tokenizer", "generic"), *(TaskId("tokens", key) for key in SHARDS))
    assert gather.files == {"test": ("law.jsonl",)}, "the training files are the shards'"


def test_a_shard_is_a_range_of_the_files(text: Path) -> None:
    ranges = cut_in_shards(["generic.?.jsonl"], 3)
    assert [len(files) for files in ranges] == [2, 2, 3]
    assert [file for files in ranges for file in files] == [Path(f"generic.{number}.jsonl") for number in range(FILES)]


def test_more_shards_than_files_are_refused(text: Path) -> None:
    with pytest.raises(DataError, match=r"8 shards of the 7 files behind generic.*: set `shards` to 7 or fewer"):
        make_plan(_config(text, shards=8), text / "run")


def test_shards_of_a_set_that_is_cut_by_tokens_are_refused(text: Path) -> None:
    smoke = Path(__file__).parents[2] / "configs" / "pipelines" / "smoke.yaml"
    with pytest.raises(ConfigError, match=r"text\.domains\.torch.*`shards: 2` with `train_tokens: 50`"):
        load_pipeline(smoke, ["text.domains.torch.shards=2", "text.domains.torch.train_tokens=50"])


def _digests(pipeline: Pipeline, root: Path) -> dict[str, str]:
    return {name.key: planned.digest for name, planned in make_plan(pipeline, root).items() if name.stage == "tokens"}


def test_one_shard_is_the_set_as_it_was(text: Path) -> None:
    assert _digests(_config(text), text / "run") == _digests(_config(text, shards=1), text / "run")


def test_a_shards_digest_is_of_its_own_files(text: Path) -> None:
    config = _config(text, shards=3)
    config = config.model_copy(update={"stages": {**config.stages, "tokenizer": config.stages["tokenizer"].model_copy(
        update={"path": str(text / "law.jsonl")})}})  # fmt: skip  # a tokenizer that the generic text does not decide
    before = _digests(config, text / "run")
    (text / "generic.2.jsonl").write_text(json.dumps({"text": "something else"}) + "\n")
    after = _digests(config, text / "run")
    assert {key for key in before if before[key] != after[key]} == {"generic.00001", "generic"}


def test_a_changed_file_is_read_again_alone(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, read = _config(text, shards=3), []
    monkeypatch.setattr(hash_cache, "TICK_NS", 0)  # files that are just written are not read twice
    make_plan(config, text / "run")
    real = hash_cache.sha256_file
    monkeypatch.setattr(hash_cache, "sha256_file", lambda file: read.append(file.name) or real(file))
    (text / "generic.5.jsonl").write_text(json.dumps({"text": "something else"}) + "\n")
    make_plan(config, text / "run")
    assert read == ["generic.5.jsonl"]
    os.utime(text / "generic.1.jsonl", ns=(1, 1))
    make_plan(config, text / "run")
    assert read[1:] == ["generic.1.jsonl"]


RUN = {"tokenize": tokenize.run, "embed": embed.run, "cluster": cluster.run, "assign": assign.run}


def _prepare(config: Pipeline, root: Path, tokenizer: Path, *, until: str = "tokens") -> Path:
    """Run the tasks up to a stage, in order; returns the root."""
    (root / "tokenizer").mkdir(parents=True)
    (root / "tokenizer" / "generic").symlink_to(tokenizer)
    order = list(config.stages)
    for task in build_graph(config).values():
        if 0 < order.index(task.id.stage) <= order.index(until):
            stage = config.stages[task.id.stage]
            folder = begin_artifact(root, *task.id, digest="t")
            RUN[stage.kind](stage, make_context(config, task, root, folder))
    return root


def _windows(folder: Path, split: str) -> list[list[int]]:
    store = TokenStore.open(folder, split)
    return [store.window(index).tolist() for index in range(len(store))]


def test_shards_hold_the_windows_of_the_whole_set_in_its_order(text: Path, tokenizer: Path) -> None:
    whole = _prepare(_config(text, **HELD_OUT), text / "whole", tokenizer)
    sharded = _prepare(_config(text, shards=3, **HELD_OUT), text / "sharded", tokenizer)
    for split in ("train", "validation", "test"):
        assert _windows(sharded / "tokens/generic", split) == _windows(whole / "tokens/generic", split)


def test_each_shard_holds_out_its_own_documents(text: Path, tokenizer: Path) -> None:
    config = _config(text, shards=3, validation_floor={"documents": 9, "tokens": 100})
    sharded = _prepare(config, text / "sharded", tokenizer) / "tokens/generic"
    whole = _prepare(_config(text), text / "whole", tokenizer) / "tokens/generic"
    train, validation = _windows(sharded, "train"), _windows(sharded, "validation")
    assert sorted(train + validation) == sorted(_windows(whole, "train") + _windows(whole, "validation"))
    counts = [json.loads((text / "sharded/tokens" / key / "store.json").read_text())["splits"] for key in SHARDS]
    assert [split["validation"]["documents"] for split in counts] == [6, 6, 9], "a tenth of 2, 2 and 3 files"
    assert [set(split) for split in counts] == [{"train", "validation"}] * 3
    store = json.loads((sharded / "store.json").read_text())["splits"]
    assert store["train"]["documents"] == FILES * DOCUMENTS - 21
    assert not list(sharded.glob("train.*")), "no token is copied"


def test_vectors_clusters_and_assignment_are_those_of_the_whole_set(text: Path, tokenizer: Path) -> None:
    whole = _prepare(_config(text, **HELD_OUT), text / "whole", tokenizer, until="assignment")
    sharded = _prepare(_config(text, shards=3, **HELD_OUT), text / "sharded", tokenizer, until="assignment")
    ours, theirs = (Vectors(root / "vectors/generic") for root in (sharded, whole))
    assert ours.shape == theirs.shape
    ids = np.arange(0, len(ours), 7)  # of all shards
    np.testing.assert_array_equal(ours.rows(ids), theirs.rows(ids))
    for name in ("clusters/generic/centroids", *(f"assignment/generic/{n}" for n in ("histogram", "order", "offsets"))):
        np.testing.assert_array_equal(np.load(sharded / f"{name}.npy"), np.load(whole / f"{name}.npy"))
    parts = [np.load(sharded / "assignment" / key / "clusters.npy") for key in SHARDS]
    np.testing.assert_array_equal(np.concatenate(parts), np.load(whole / "assignment/generic/clusters.npy"))
    assert not list((sharded / "vectors/generic").glob("*.npy")), "no vector is copied"


def test_unknown_text_is_judged_over_the_whole_set(text: Path, tokenizer: Path) -> None:
    """Of the words of the last shard's files TF-IDF knows none; of the set's it knows more than half."""
    for number in (4, 5, 6):
        (text / f"generic.{number}.jsonl").write_text(json.dumps({"text": "a b"}) + "\n")
    root = _prepare(_config(text, shards=3, **HELD_OUT), text / "run", tokenizer, until="vectors")
    part, whole = (Vectors(root / "vectors" / key) for key in (SHARDS[-1], "generic"))
    assert part.zero == len(part) == 3 < len(whole) / 2 and whole.zero == 3


def test_a_damaged_part_is_named(text: Path, tokenizer: Path) -> None:
    config = _config(text, shards=3)
    root = _prepare(config, text / "run", tokenizer, until="assignment")
    path = root / "vectors" / SHARDS[1] / "train.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=r"vectors/generic\.00001/t/train\.npy: \d+ bytes, .* says"):
        Vectors(root / "vectors/generic")
    (root / "assignment" / SHARDS[2] / "clusters.npy").unlink()
    task = build_graph(config)[TaskId("assignment", "generic")]
    with pytest.raises(ArtifactError, match=r"assignment/generic\.00002/clusters\.npy: no such file"):
        assign.run(config.stages["assignment"], make_context(config, task, root, root / "assignment/generic"))


def test_every_set_is_encoded_by_the_encoders_own_task(text: Path) -> None:
    graph, made = build_graph(_config(text, shards=3)), TaskId("vectors", "generic.encoder")
    readers = [name.key for name, task in graph.items() if made in task.inputs]
    assert readers == [*SHARDS, "law"]
    assert graph[made].inputs == (TaskId("tokenizer", "generic"), TaskId("tokens", "generic"))
    assert graph[TaskId("vectors", "generic")].inputs == tuple(TaskId("vectors", key) for key in SHARDS)


def test_the_tokenizer_of_a_set_in_shards_reads_the_beginning_of_each_file(text: Path) -> None:
    files = [Path(f"generic.{number}.jsonl") for number in range(FILES)]
    texts = list(beginnings(files, FILES * 100, text_field="text"))
    assert [texts.count(t) for t in texts] == [1] * 2 * FILES, "two documents of about 60 characters each reach 100"
    assert {t.split(":")[0] for t in texts} == {
        f"Number {number} of generic.{file}" for number in (0, 1) for file in range(FILES)
    }
    digests = {shards: make_plan(_config(text, shards=shards), text / "run") for shards in (1, 2, 3)}
    made = {shards: plan[TaskId("tokenizer", "generic")].digest for shards, plan in digests.items()}
    assert made[1] != made[2] == made[3]
