"""What is in a task's digest. Every value of a page is flipped: some task must get another digest, or the value stands on the
list of those that decide nothing, with the reason."""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import sha256_json
from megatron_specialm.config.graph import ARTIFACT_FORMAT, TaskId, build_graph, digest
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.launch import hashes
from megatron_specialm.launch.plan import make_plan

PAGES = configs_folder() / "pipelines"
DEFAULTS = Path(__file__).parent / "golden" / "defaults.json"
DECIDES_NOTHING = {
    "Pipeline.name": "a run folder is of one name: another one needs another root",
    "Pipeline.root": "a place",
    "Local.*": "how this machine is used",
    "ParallelConfig.*": "a layout computes what one process computes",
    "CheckpointPolicy.*": "how often is saved",
    "TrainStage.micro_batch_size": "portions",
    "TrainStage.log_every": "how talkative it is",
    "TrainStage.tensorboard": "how talkative it is",
    "TrainStage.wandb_project": "how talkative it is",
    "TrainStage.method": "a name in tables, which are made anew; an export's digest has it",
    "SelectStage.method": "a name in tables, which are made anew; an export's digest has it",
    "TokenizeStage.workers": "portions",
    "ClusterStage.processes": "portions",
    "SelectStage.batch_size": "portions",
    "TeachStage.batch_size": "portions",
    "EvaluateStage.batch_size": "portions",
    "Trial.micro_batch_size": "portions",
    "TextSet.domain": "groups sizes in tables",
}
# Values of fields that are not given in any page, and what else to try where the next number would not do.
TRY: dict[str, list[Any]] = {
    "path": ["tokenizer.model"], "early_stopping": [{"evaluate_every": 5}], "lora": [{}], "soup": [{}], "fp8": [{}],
    "trial": [{"steps": 4, "global_batch_size": 8}], "recipe": ["paper"], "wandb_project": ["x"], "method": ["x"],
    "train_tokens": [5000], "max_windows": [7], "workers": [2], "parallel_tasks": [2], "domain": ["x"], "alpha": [8, 0.25],
    "query_groups": [4, 1], "clusters": [[0]], "cache": ["taught"], "temperature": [2.0], "precision": ["bf16", "fp8"],
    "family": ["llama", "neox"], "count": [9], "validation": [["v.jsonl"]], "compare": [["loss"], ["halving"]],
    "assignment": ["assignment-b"], "init": ["slm-b"], "replay_fraction": [0.1], "domain_fraction": [0.1],
    "attention_heads": [2, 1], "hidden_size": [64, 128], "linears": [["qkv"], ["qkv", "fc1"]], "root": ["elsewhere"],
    "projection": [None, {"experts": 4, "capacity": 2, "code_size": 4}], "distill": [None, {"teacher": "slm-b"}],
    "tensor_parallel": [2], "pipeline_parallel": [2], "data_parallel": [2], "context_parallel": [2],
    "bf16_first_layers": [1], "bf16_last_layers": [1], "warmup_steps": [0, 1], "keep": ["exact", "top-k", "sampled"],
}  # fmt: skip
# Not to be changed alone: they go with others, or give the same either way. The fields inside them are flipped.
NOT_ALONE = {"TrainStage.model", "TrainStage.projection", "TrainStage.fp8", "Projection.experts"}
ALL_KINDS = """
name: all
root: run
text:
  generic: {train: [a.jsonl, b.jsonl, c.jsonl], validation: v.jsonl, test: t.jsonl, shards: 2}
  domains:
    law: {train: [l.jsonl, m.jsonl], test: n.jsonl, text_field: body}
    tax: {train: x.jsonl, validation: y.jsonl, test: z.jsonl, train_tokens: 4000, domain: tax}
defaults:
  train:
    {tokens: tokens, model: smoke, steps: 9, global_batch_size: 8, micro_batch_size: 4, schedule: {kind: wsd, warmup_steps: 2}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 400}
  tokenizer-b: {kind: tokenizer, path: tokenizer.model}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  tokens-b: {kind: tokenize, tokenizer: tokenizer, context_length: 64}
  tokens-c: {kind: tokenize, tokenizer: tokenizer, context_length: 32, validation_fraction: 0.2}
  vectors: {kind: embed, tokens: tokens, encoder: {kind: tfidf, dimensions: 8}}
  vectors-b: {kind: embed, tokens: tokens, encoder: {kind: static}}
  vectors-c: {kind: embed, tokens: tokens, encoder: {kind: sentence-bert, model: some-name}}
  clusters: {kind: cluster, vectors: vectors, k: 4}
  clusters-b: {kind: cluster, vectors: vectors-b, k: 4}
  assignment: {kind: assign, clusters: clusters, vectors: vectors}
  assignment-b: {kind: assign, clusters: clusters-b, vectors: vectors-b}
  slm: {kind: train, data: generic, optimizer: {weight_decay: 0.1}}
  slm-b: {kind: train, data: generic}
  network:
    {kind: train, data: generic, assignment: assignment, projection: {experts: 4, capacity: 2, code_size: 4},
     soup: {fraction: 0.5}, windows_per_expert: 4}
  mixture: {kind: train, data: cluster, assignment: assignment}
  like: {kind: train, data: importance, assignment: assignment}
  wide: {kind: train, data: generic, precision: bf16, model: &wide {layers: 4, hidden_size: 128, ffn_hidden_size: 256,
    attention_heads: 4}}
  eight: {kind: train, data: generic, precision: fp8, micro_batch_size: 8, model: *wide}
  split: {kind: train, data: generic, model: *wide, parallel: {tensor_parallel: 2, pipeline_parallel: 2}}
  tuned: {kind: train, data: domain, init: slm, lora: {rank: 4}, early_stopping: {evaluate_every: 3}}
  taught: {kind: teach, teacher: slm, tokens: tokens, count: 5}
  taught-b: {kind: teach, teacher: slm-b, tokens: tokens-c, count: 5}
  student: {kind: train, data: domain, distill: {teacher: slm, alpha: 0.5, cache: taught}}
  pupil: {kind: train, data: domain, distill: {teacher: slm, alpha: 0.5}}
  chosen: {kind: select, experts: mixture, tokens: tokens, by: finetuned, trial: {steps: 4, global_batch_size: 8}}
  chosen-b: {kind: select, experts: network, tokens: tokens}
  perplexity: {kind: evaluate, tokens: tokens, models: [slm, tuned]}
  export: {kind: export, tokens: tokens, models: [tuned, chosen]}
"""


class Leaf(NamedTuple):
    """A value of a page: its place, the field of which class it is, and the field's type."""

    path: tuple[str, ...]
    field: str
    value: Any
    annotation: Any


def _leaves(settings: BaseModel, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    for name, field in type(settings).model_fields.items():
        value, place = getattr(settings, name), (*path, name)
        inside = {(): value} if isinstance(value, BaseModel) else {}
        if isinstance(value, dict):
            inside = {(key,): part for key, part in value.items()}
        for key, part in inside.items():
            yield from _leaves(part, (*place, *key))
        if not inside or type(None) in get_args(field.annotation):
            yield Leaf(place, f"{type(settings).__name__}.{name}", value, field.annotation)


def _others(leaf: Leaf, stages: list[str]) -> Iterator[Any]:
    """Other values to try: those of a choice, the next number, the other truth, another file, another stage."""
    value, name = leaf.value, leaf.path[-1]
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2, value * 4, value // 2)
    elif isinstance(value, float):
        yield from (value / 2 + 0.01, value / 2, value + 1)
    elif isinstance(value, list | tuple):
        yield from ([*value, "more.jsonl"], list(value)[:-1])
    elif isinstance(value, str):
        yield f"{value}x"
        yield from stages
    elif isinstance(value, BaseModel):
        yield None
        return
    yield from _choices(leaf.annotation)
    yield from TRY.get(name, [])


def _choices(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from _choices(part)


def _digests(page: dict[str, Any]) -> dict[TaskId, str] | None:
    """Digests where each entry is a file of its own content; None for a page that is not valid."""
    try:
        pipeline = Pipeline.model_validate(page)
        graph = build_graph(pipeline)
    except (ValidationError, ConfigError):
        return None
    found: dict[TaskId, str] = {}
    for task in graph.values():
        contents = {
            role: sha256_json([*entries, task.shard and task.shard.number]) for role, entries in task.files.items()
        }
        found[task.id] = digest(
            pipeline, task, inputs={name: found[name] for name in task.inputs}, file_hashes=contents
        )
    return found


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    path = tmp_path_factory.mktemp("page") / "page.yaml"
    path.write_text(ALL_KINDS)
    return load_pipeline(path)


@pytest.fixture(scope="module")
def flips(all_kinds: Pipeline) -> dict[str, list[tuple[str, bool]]]:
    """Of each field, the flips that were valid: where, and whether a digest changed."""
    outcome: dict[str, list[tuple[str, bool]]] = {}
    shipped = [load_pipeline(PAGES / f"{name}.yaml") for name in ("smoke", "your-domain")]
    for number, pipeline in enumerate([all_kinds, *shipped]):
        page, stages = pipeline.model_dump(mode="json"), list(pipeline.stages)
        before = _digests(page)
        for leaf in _leaves(pipeline):
            if number and leaf.field in outcome and len(leaf.path) > 3 and len(outcome[leaf.field]) > 12:
                continue  # one of very many of its kind
            outcome.setdefault(leaf.field, [])
            for other in _others(leaf, stages):
                if other == leaf.value:
                    continue
                changed = copy.deepcopy(page)
                place = changed
                for part in leaf.path[:-1]:
                    place = place[part]
                place[leaf.path[-1]] = other
                if (after := _digests(changed)) is not None and Pipeline.model_validate(changed) != pipeline:
                    outcome[leaf.field].append((f"{'.'.join(leaf.path)}={other}", before != after))
                    break
    return outcome


def _reason(field: str) -> str | None:
    return DECIDES_NOTHING.get(field) or DECIDES_NOTHING.get(f"{field.partition('.')[0]}.*")


def test_every_value_decides_a_digest_or_has_a_reason_why_not(flips: dict[str, list[tuple[str, bool]]]) -> None:
    for field, tried in flips.items():
        for where, changed in tried:
            assert changed or _reason(field), f"{where}: no task gets another digest, and there is no reason for it"


def test_every_field_has_been_flipped(flips: dict[str, list[tuple[str, bool]]]) -> None:
    kinds = {field for field in flips if field.endswith(".kind")}
    never = {field for field, tried in flips.items() if not tried} - kinds
    assert never == NOT_ALONE, never ^ NOT_ALONE


def test_reasons_are_of_fields_that_decide_nothing(flips: dict[str, list[tuple[str, bool]]]) -> None:
    for field in DECIDES_NOTHING:
        tried = [
            one
            for name, ones in flips.items()
            if name == field or f"{name.partition('.')[0]}.*" == field
            for one in ones
        ]
        assert tried and any(not changed for _, changed in tried), field


def _defaults(cls: type[BaseModel], found: dict[str, Any]) -> dict[str, Any]:
    """The default of every field of a class and of those inside it, as JSON."""
    for name, field in cls.model_fields.items():
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            found[f"{cls.__name__}.{name}"] = (
                default.model_dump(mode="json") if isinstance(default, BaseModel) else default
            )
        for inner in _classes_in(field.annotation):
            _defaults(inner, found)
    return found


def _classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _classes_in(part)


def test_no_default_has_changed() -> None:
    """A setting at its default is in no digest: with another default, what was made with the old one would pass for made with
    the new one. So either the default stays, or ARTIFACT_FORMAT rises and the file is written again:
    `python -m tests.unit.test_digests`. New settings are added by the same command."""
    recorded, now = json.loads(DEFAULTS.read_text()), json.loads(json.dumps(_defaults(Pipeline, {})))
    assert recorded["format"] == ARTIFACT_FORMAT
    for name, default in recorded["defaults"].items():
        assert now.get(name) == default or name not in now, f"{name}: its default was {default}"


# --- what files are ---------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of `_page`, each of its own text."""
    monkeypatch.chdir(tmp_path)
    for name in ("g0", "g1", "g2", "gt", "law", "lawt", "tax", "taxt"):
        Path(f"{name}.jsonl").write_text(json.dumps({"text": name, "body": name}) + "\n")
    return tmp_path


def _page(folder: Path, **text: Any) -> Pipeline:
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
            "name": "page",
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
    page = _page(folder, **text)
    return {str(name): planned.digest for name, planned in make_plan(page, Path(page.root)).items()}


def _changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


OF_LAW = {"tokens/law", "vectors/law", "assignment/law", "tuned/law", "perplexity/tuned.law"}
# It is the one task that reads all sets: a model for everybody is evaluated on each.
OF_ALL = {"perplexity/slm.generic"}


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
        assert _changed(before, _plan(text, generic=generic, law=change)) == OF_LAW | OF_ALL, change
    (text / "law.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    assert _changed(before, _plan(text, generic=generic)) == OF_LAW | OF_ALL


def test_a_new_domain_leaves_what_is_there(text: Path) -> None:
    before, more = _plan(text), _page(text)
    domains = {**more.text.domains, "new": more.text.domains["law"]}
    more = more.model_copy(update={"text": more.text.model_copy(update={"domains": domains})})
    after = {str(name): planned.digest for name, planned in make_plan(more, text / "run").items()}
    assert {name for name in before if before[name] != after[name]} == OF_ALL


def test_the_order_of_files_counts_and_so_does_moving_one_to_another_set(text: Path) -> None:
    before = _plan(text, law={"train": ["law.jsonl", "tax.jsonl"]})
    assert _changed(before, _plan(text, law={"train": ["tax.jsonl", "law.jsonl"]})) == OF_LAW | OF_ALL
    assert _changed(before, _plan(text, law={"train": ["law.jsonl"], "validation": ["tax.jsonl"]})) == OF_LAW | OF_ALL
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
    assert _changed(_plan(text), _plan(text, law={"train": ["law.txt"]})) == OF_LAW | OF_ALL


def test_an_edit_that_leaves_size_and_time_as_they_were_is_noticed(text: Path) -> None:
    before, path = _plan(text), text / "law.jsonl"
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"law", b"LAW"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    assert _changed(before, _plan(text)) == OF_LAW | OF_ALL


def test_an_edit_within_one_tick_of_the_clock_is_noticed(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem whose times stand still, as between two ticks: they say nothing of a file that was just written."""
    now = (text / "law.jsonl").stat().st_ctime_ns
    monkeypatch.setattr(hashes, "_stamp", lambda file: [file.stat().st_size, now, now, 1])
    before = _plan(text)
    (text / "law.jsonl").write_bytes((text / "law.jsonl").read_bytes().replace(b"law", b"LAW"))
    assert _changed(before, _plan(text)) == OF_LAW | OF_ALL


def test_a_file_that_was_written_long_ago_is_read_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (text / "law.jsonl").stat().st_ctime_ns - 10 * hashes.TICK_NS
    monkeypatch.setattr(hashes, "_stamp", lambda file: [file.stat().st_size, old, old, 1])
    before = _plan(text)
    monkeypatch.setattr(hashes, "sha256_file", lambda file: pytest.fail(f"{file} is read again"))
    assert _plan(text) == before == _plan(text, generic={"train": ["./g[0-2].jsonl"]})


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
    page = _page(text)
    vectors = {"kind": "embed", "tokens": "tokens", "encoder": {"kind": "sentence-bert", "model": "x"}}
    page = Pipeline.model_validate({**page.model_dump(), "stages": {**page.model_dump()["stages"], "vectors": vectors}})
    for name in ("model", "same"):
        (text / name / "inside").mkdir(parents=True)
        (text / name / "config.json").write_text("{}")
        (text / name / "inside" / "weights").write_text("abc")
    first = _encoder(page, "model", text / "run")
    assert first == _encoder(page, "./model", text / "run") == _encoder(page, str(text / "same"), text / "run")
    (text / "same" / "inside" / "weights").write_text("abd")
    assert first != _encoder(page, "same", text / "run")
    (text / "model" / "config.json").rename(text / "model" / "other.json")
    assert first != _encoder(page, "model", text / "run"), "the names in a folder decide how it is read"
    assert _encoder(page, "some/hub-name", text / "run") != _encoder(page, "other/hub-name", text / "run")
    installed, missing = _encoder(page, "package:numpy", text / "run"), _encoder(page, "package:nothing", text / "run")
    monkeypatch.setattr(hashes.importlib.metadata, "version", lambda name: "0.0.1")
    assert installed != _encoder(page, "package:numpy", text / "run") and missing != installed


if __name__ == "__main__":
    content = {"format": ARTIFACT_FORMAT, "defaults": _defaults(Pipeline, {})}
    DEFAULTS.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
