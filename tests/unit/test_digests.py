"""What is in a task's digest. Every value of a page is flipped: some task must get another digest, or the value stands on the
list of those that decide nothing, with the reason."""

import copy
import json
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
from tests.settings import settings_in

PAGES = configs_folder() / "pipelines"
DEFAULTS = Path(__file__).parent / "golden" / "defaults.json"
DECIDES_NOTHING = {
    "Pipeline.name": "a run folder is of one name: another one needs another root",
    "Pipeline.root": "a place",
    "Pipeline.reuse": "places where equal work may stand",
    "Text.made_by": "a hint in errors",
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
    "ValidationFloor.*": "of a set with `validation` files nothing is held out; of others the digest has it",
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
    "training_seed": [1],
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
    {tokens: tokens, model: nano, steps: 9, global_batch_size: 8, micro_batch_size: 4, schedule: {kind: wsd, warmup_steps: 2}}
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
  tried:
    {kind: train, data: domain, init: slm, early_stopping: {evaluate_every: 3}, optimizer: {learning_rate: [1.0e-3, 2.0e-3]},
     trial_steps: 3}
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
        for inner in settings_in(field.annotation):
            _defaults(inner, found)
    return found


def test_no_default_has_changed() -> None:
    """A setting at its default is in no digest: with another default, what was made with the old one would pass for made with
    the new one. So either the default stays, or ARTIFACT_FORMAT rises and the file is written again:
    `python -m tests.unit.test_digests`. New settings are added by the same command."""
    recorded, now = json.loads(DEFAULTS.read_text()), json.loads(json.dumps(_defaults(Pipeline, {})))
    assert recorded["format"] == ARTIFACT_FORMAT
    assert not now.keys() - recorded["defaults"].keys(), "new settings: record their defaults"
    for name, default in recorded["defaults"].items():
        assert now.get(name) == default or name not in now, f"{name}: its default was {default}"


if __name__ == "__main__":
    content = {"format": ARTIFACT_FORMAT, "defaults": _defaults(Pipeline, {})}
    DEFAULTS.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
