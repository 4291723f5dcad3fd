"""Files are known by their content, order and role: whatever their names and times, other bytes have another digest, and the
same ones the same."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_specialm.base import hash_cache
from megatron_specialm.base.errors import ConfigError
from megatron_specialm.cli import app
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph import file_hashes as hashes
from megatron_specialm.graph.plan import make_plan
from megatron_specialm.graph.tasks import TaskId
from tests.run_folder import make_run


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of `_config`, each of its own text."""
    monkeypatch.chdir(tmp_path)
    for name in ("g0", "g1", "g2", "gt", "law", "lawt", "tax", "taxt"):
        Path(f"{name}.jsonl").write_text(json.dumps({"text": name, "body": name}) + "\n")
    return tmp_path


def _config(folder: Path, **text: Any) -> Pipeline:
    sets = {
        "generic": {"train": ["g0.jsonl", "g1.jsonl", "g2.jsonl"], "test": ["gt.jsonl"]},
        "law": {"train": ["law.jsonl"], "test": ["lawt.jsonl"]},
        "tax": {"train": ["tax.jsonl"], "test": ["taxt.jsonl"]},
    }
    for name, changes in text.items():
        sets[name] = {**sets[name], **changes}
    shape = {"layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "attention_heads": 4}
    train = {"kind": "train", "tokens": "tokens", "steps": 4, "global_batch_size": 8, "schedule": {"warmup_steps": 1}}
    return Pipeline.model_validate(
        {
            "name": "config",
            "root": str(folder / "run"),
            "text": {"generic": sets.pop("generic"), "domains": sets},
            "stages": {
                "tokenizer": {"kind": "tokenizer"},
                "tokens": {"kind": "tokenize", "tokenizer": "tokenizer"},
                "vectors": {"kind": "embed", "tokens": "tokens", "encoder": {"kind": "tfidf"}},
                "clusters": {"kind": "cluster", "vectors": "vectors", "k": 2},
                "assignment": {"kind": "assign", "clusters": "clusters", "vectors": "vectors"},
                "slm": {**train, "data": "generic", "model": shape},
                "tuned": {**train, "data": "domain", "init": "slm"},
                "perplexity": {"kind": "evaluate", "tokens": "tokens", "models": ["slm", "tuned"]},
            },
        }
    )


def _plan(folder: Path, **text: Any) -> dict[str, str]:
    config = _config(folder, **text)
    return {str(name): planned.digest for name, planned in make_plan(config, Path(config.root)).items()}


def _changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


OF_LAW = {
    "tokens/law", "vectors/law", "assignment/law", "tuned/law", "perplexity/tuned.law", "perplexity/slm.generic.law",
}  # fmt: skip


@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_bytes_have_the_same_digests_however_they_are_named(text: Path, shards: int) -> None:
    before = _plan(text, generic={"shards": shards})
    (text / "link.jsonl").symlink_to("law.jsonl")
    (text / "moved").mkdir()
    for number, name in enumerate("abc"):
        shutil.copy(text / f"g{number}.jsonl", text / "moved" / f"{name}.jsonl")
    for spelling in (
        {"generic": {"train": ["./g0.jsonl", str(text / "g1.jsonl"), "moved/../g2.jsonl"]}},
        {"generic": {"train": ["g[0-2].jsonl"]}},
        {"generic": {"train": ["g[01].jsonl", "g2.jsonl"]}},
        {"generic": {"train": ["moved/*.jsonl"]}},
        {"law": {"train": ["link.jsonl"]}},
    ):
        spelling["generic"] = {"shards": shards, **spelling.get("generic", {})}
        assert _plan(text, **spelling) == before, spelling


@pytest.mark.parametrize("shards", [1, 3])
def test_a_domains_text_changes_its_own_tasks_alone(text: Path, shards: int) -> None:
    generic = {"shards": shards}
    before = _plan(text, generic=generic)
    for change in (
        {"train": ["lawt.jsonl"], "test": ["law.jsonl"]},
        {"validation": ["tax.jsonl"]},
        {"text_field": "body"},
        {"train": ["law.jsonl", "tax.jsonl"]},
        {"train_tokens": 100},
        {"test": ["taxt.jsonl"]},
    ):
        assert _changed(before, _plan(text, generic=generic, law=change)) == OF_LAW, change
    (text / "law.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    assert _changed(before, _plan(text, generic=generic)) == OF_LAW


def test_a_new_domain_leaves_what_is_there(text: Path) -> None:
    before, more = _plan(text), _config(text)
    domains = {**more.text.domains, "new": more.text.domains["law"]}
    more = more.model_copy(update={"text": more.text.model_copy(update={"domains": domains})})
    after = {str(name): planned.digest for name, planned in make_plan(more, text / "run").items()}
    assert _changed(before, after) == {name.replace("law", "new") for name in OF_LAW}


def test_the_order_of_files_counts_and_so_does_moving_one_to_another_set(text: Path) -> None:
    before = _plan(text, law={"train": ["law.jsonl", "tax.jsonl"]})
    assert _changed(before, _plan(text, law={"train": ["tax.jsonl", "law.jsonl"]})) == OF_LAW
    assert _changed(before, _plan(text, law={"train": ["law.jsonl"], "validation": ["tax.jsonl"]})) == OF_LAW
    everything = _changed(before, _plan(text, generic={"train": ["g1.jsonl", "g0.jsonl", "g2.jsonl"]}))
    assert {"tokenizer/generic", "tokens/generic", "slm/generic"} <= everything
    for shards in (2, 3):
        one = _plan(text, generic={"shards": shards})
        other = _plan(text, generic={"shards": shards, "train": ["g1.jsonl", "g0.jsonl", "g2.jsonl"]})
        assert one["tokens/generic.00000"] != other["tokens/generic.00000"]
        assert (
            one["tokens/generic.00000"]
            != _plan(text, generic={"shards": shards, "text_field": "body"})["tokens/generic.00000"]
        )
        held = _plan(text, generic={"shards": shards, "validation": ["tax.jsonl"]})
        assert one["tokens/generic.00000"] != held["tokens/generic.00000"], "nothing of the shard is held out now"


def test_the_same_bytes_read_as_lines_or_as_a_whole_are_other_documents(text: Path) -> None:
    shutil.copy(text / "law.jsonl", text / "law.txt")
    assert _changed(_plan(text), _plan(text, law={"train": ["law.txt"]})) == OF_LAW


def test_a_dataset_of_the_hub_is_its_name_and_a_folder_its_files(text: Path) -> None:
    names = ["hf:some/name", "hf:some/name:config", "hf:other/name"]
    assert len({_plan(text, law={"train": [name]})["tokens/law"] for name in names}) == 3
    (text / "folder").mkdir()
    shutil.copy(text / "law.jsonl", text / "folder" / "a.jsonl")
    before = _plan(text, law={"train": ["hf:folder"]})
    assert before == _plan(text, law={"train": [f"hf:{text / 'folder'}"]})
    (text / "folder" / "a.jsonl").write_text("other")
    assert _changed(before, _plan(text, law={"train": ["hf:folder"]})) == OF_LAW


def test_an_edit_that_leaves_size_and_time_as_they_were_is_noticed(text: Path) -> None:
    before, path = _plan(text), text / "law.jsonl"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"law", b"LAW"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    assert _changed(before, _plan(text)) == OF_LAW


def test_an_edit_within_one_tick_of_the_clock_is_noticed(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem whose times stand still, as between two ticks: they say nothing of a file that was just written."""
    now = (text / "law.jsonl").stat().st_ctime_ns
    monkeypatch.setattr(hash_cache, "_stamp", lambda file: [file.stat().st_size, now, now, 1])
    before = _plan(text)
    (text / "law.jsonl").write_bytes((text / "law.jsonl").read_bytes().replace(b"law", b"LAW"))
    assert _changed(before, _plan(text)) == OF_LAW


def test_a_file_that_was_written_long_ago_is_read_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (text / "law.jsonl").stat().st_ctime_ns - 10 * hash_cache.TICK_NS
    monkeypatch.setattr(hash_cache, "_stamp", lambda file: [file.stat().st_size, old, old, 1])
    before = _plan(text)
    monkeypatch.setattr(hash_cache, "sha256_file", lambda file: pytest.fail(f"{file} is read again"))
    assert _plan(text) == before == _plan(text, generic={"train": ["./g[0-2].jsonl"]})


def test_what_was_read_at_a_time_yet_to_come_is_read_again(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that was ahead and has been set back: a file that changes from now on is no younger than that."""
    now = (text / "law.jsonl").stat().st_ctime_ns
    monkeypatch.setattr(hash_cache, "_stamp", lambda file: [file.stat().st_size, now, now, 1])
    with monkeypatch.context() as ahead:
        real = time.time_ns
        ahead.setattr(time, "time_ns", lambda: real() + 7200 * 10**9)
        before = _plan(text)
    (text / "law.jsonl").write_bytes((text / "law.jsonl").read_bytes().replace(b"law", b"LAW"))
    assert _changed(before, _plan(text)) == OF_LAW


@pytest.mark.parametrize("content", ["", "[]", '{"a": 5}', '{"a": {"stamp": 1}}', "{"])
def test_a_damaged_cache_is_made_again(text: Path, content: str) -> None:
    before, cache = _plan(text), text / "run" / hashes.CACHE
    cache.write_text(content)
    assert _plan(text) == before and len(json.loads(cache.read_text())) == 8


def _encoder(pipeline: Pipeline, model: str, root: Path) -> str:
    encoder = pipeline.stages["vectors"].encoder.model_copy(update={"model": model})  # type: ignore[union-attr]
    stage = pipeline.stages["vectors"].model_copy(update={"encoder": encoder})
    changed = pipeline.model_copy(update={"stages": {**pipeline.stages, "vectors": stage}})
    return make_plan(changed, root)[TaskId("vectors", "generic.encoder")].digest


def test_a_model_is_its_files_and_one_in_a_package_its_version(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(text)
    vectors = {"kind": "embed", "tokens": "tokens", "encoder": {"kind": "sentence-bert", "model": "x"}}
    config = Pipeline.model_validate(
        {**config.model_dump(), "stages": {**config.model_dump()["stages"], "vectors": vectors}}
    )
    for name in ("model", "same"):
        (text / name / "inside").mkdir(parents=True)
        (text / name / "config.json").write_text("{}")
        (text / name / "inside" / "weights").write_text("abc")
    first = _encoder(config, "model", text / "run")
    assert first == _encoder(config, "./model", text / "run") == _encoder(config, str(text / "same"), text / "run")
    (text / "same" / "inside" / "weights").write_text("abd")
    assert first != _encoder(config, "same", text / "run")
    (text / "model" / "config.json").rename(text / "model" / "other.json")
    assert first != _encoder(config, "model", text / "run"), "the names in a folder decide how it is read"
    assert _encoder(config, "some/hub-name", text / "run") != _encoder(config, "other/hub-name", text / "run")
    installed, missing = (
        _encoder(config, "package:numpy", text / "run"),
        _encoder(config, "package:nothing", text / "run"),
    )
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    assert installed != _encoder(config, "package:numpy", text / "run") and missing != installed


def test_text_is_not_looked_for_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, monkeypatch)
    run.train("slm", "generic", step=1, loss=1.0)  # leaves a metrics.jsonl
    own = next(run.root.rglob("metrics.jsonl"))
    for entry in ("**/*.jsonl", f"{tmp_path}/**/*.jsonl", f"{run.root.parent}/*/artifacts/*/*/*/*.jsonl"):
        for command in ("check", "plan"):
            outcome = CliRunner().invoke(
                app, [command, "config.yaml", f"text.generic.train=['data/smoke/*', '{entry}']"]
            )
            assert isinstance(outcome.exception, ConfigError)
            assert str(outcome.exception).startswith(f"{entry}: finds ") and "metrics.jsonl" in str(outcome.exception)
    named = CliRunner().invoke(app, ["plan", "config.yaml", f"text.generic.train={own}"])
    assert named.exit_code == 0, "who names a file means it"
