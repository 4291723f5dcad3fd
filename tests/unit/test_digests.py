"""What is in a task's digest. Every value of a config is flipped: some task must get another digest, or the value stands on the
list of those that decide nothing, with the reason."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import sha256_json
from megatron_specialm.config.base import Settings
from megatron_specialm.config.load import configs_folder, dump_pipeline, load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.digests import Introduced, content_of, digest, introduced_default
from megatron_specialm.graph.tasks import Task, TaskId
from tests.settings import settings_in

CONFIGS = configs_folder() / "pipelines"
SHIPPED, SMOKE = sorted(CONFIGS.glob("*.yaml")), CONFIGS / "smoke.yaml"
DEFAULTS = Path(__file__).parent / "golden" / "defaults.json"
GOLDEN = DEFAULTS.parent / "digests"
WIDE = {"layers": 4, "hidden_size": 128, "ffn_hidden_size": 256, "attention_heads": 4}
DECIDES_NOTHING = {
    "Pipeline.name": "a run folder is of one name: another one needs another root",
    "Pipeline.root": "a place",
    "Pipeline.reuse": "places where equal work may stand",
    "Pipeline.ask_above_device_hours": "when `run` asks",
    "Text.made_by": "a hint in errors",
    "Local.*": "how this machine is used",
    "ParallelConfig.*": "a layout computes what one process computes",
    "CheckpointPolicy.*": "how often is saved",
    "TrainStage.micro_batch_size": "portions, but for MoE models that balance or drop the tokens of a micro-batch",
    "TrainStage.log_every": "how talkative it is",
    "TrainStage.tensorboard": "how talkative it is",
    "TrainStage.wandb_project": "how talkative it is",
    "Runtime.*": "what the loop does beside its steps",
    "TrainStage.method": "a name in tables, which are redone; an export's digest has it",
    "ImportStage.method": "a name in tables, which are redone; an export's digest has it",
    "SelectStage.method": "a name in tables, which are redone; an export's digest has it",
    "TokenizeStage.workers": "portions",
    "ClusterStage.processes": "portions",
    "SelectStage.batch_size": "portions",
    "TeachStage.batch_size": "portions",
    "EvaluateStage.batch_size": "portions",
    "Trial.micro_batch_size": "portions",
    "TrainStage.packing": "portions, whose sums are equal but for rounding",
    "Trial.packing": "portions, whose sums are equal but for rounding",
    "TeachStage.packing": "portions, whose outputs are equal but for rounding",
    "EvaluateStage.packing": "portions, whose sums are equal but for rounding",
    "TextSet.domain": "groups sizes in tables",
    "ValidationFloor.*": "of a set with `validation` files nothing is held out; of others the digest has it",
}
# Values of fields that are not given in any config, and what else to try where the next number would not do.
TRY: dict[str, list[Any]] = {
    "path": ["tokenizer.model"], "config": ["config.json"], "tokenizer": ["tokenizer.model"],
    "early_stopping": [{"evaluate_every": 5}], "lora": [{}], "soup": [{}], "fp8": [{}],
    "trial": [{"steps": 4, "global_batch_size": 8}], "recipe": ["paper"], "wandb_project": ["x"], "method": ["x"],
    "train_tokens": [5000], "max_windows": [7], "workers": [2], "parallel_tasks": [2], "domain": ["x"], "alpha": [8, 0.25],
    "query_groups": [4, 1], "kv_channels": [32], "rotary_scaling": [8.0],
    "clusters": [[0]], "cache": ["taught"], "temperature": [2.0], "precision": ["bf16", "fp8"],
    "family": ["llama", "neox"], "count": [9], "validation": [["v.jsonl"]], "compare": [["loss"], ["halving"]],
    "moe": [{"experts": 2}], "ffn_hidden_size": [32], "shared_expert": [16],
    "assignment": ["assignment-b"], "init": ["slm-b"], "continues": [None], "replay_fraction": [0.1], "domain_fraction": [0.1],
    "attention_heads": [2, 1], "hidden_size": [64, 128], "linears": [["qkv"], ["qkv", "fc1"]], "root": ["elsewhere"],
    "projection": [None, {"experts": 4, "capacity": 2, "code_size": 4}], "distill": [None, {"teacher": "slm-b"}],
    "tensor_parallel": [2], "pipeline_parallel": [2], "data_parallel": [2], "context_parallel": [2],
    "training_seed": [1], "data": ["domain", "generic"], "profile_steps": [[3]], "memory_snapshot_steps": [[3]],
    "bf16_first_layers": [1], "bf16_last_layers": [1], "warmup_steps": [0, 1], "keep": ["exact", "top-k", "sampled"],
}  # fmt: skip
# Not to be changed alone: they go with others, or give the same either way. The fields inside them are flipped.
NOT_ALONE = {
    "TrainStage.model",
    "GenericTraining.projection",
    "TrainStage.fp8",
    "Projection.experts",
    "MixtureOfExperts.route",
}
EVERY_KIND = GOLDEN.parent / "all-kinds.yaml"
ALL_KINDS = EVERY_KIND.read_text()
Graph = dict[TaskId, Task]


class Leaf(NamedTuple):
    """A value of a config: its place, the field of which class it is, and the field's type."""

    path: tuple[str, ...]
    field: str
    value: Any
    annotation: Any


def _name(cls: type[BaseModel], field: str) -> str:
    """A field by its class; one that all train stages have, by their common class."""
    is_common = issubclass(cls, TrainStage) and field in TrainStage.model_fields
    return f"{'TrainStage' if is_common else cls.__name__}.{field}"


def _leaves(settings: BaseModel, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    for name, field in type(settings).model_fields.items():
        value, place = getattr(settings, name), (*path, name)
        inside = {(): value} if isinstance(value, BaseModel) else {}
        if isinstance(value, dict):
            inside = {(key,): part for key, part in value.items()}
        for key, part in inside.items():
            yield from _leaves(part, (*place, *key))
        if not inside or type(None) in get_args(field.annotation):
            yield Leaf(place, _name(type(settings), name), value, field.annotation)


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
    elif isinstance(value, str) and _takes_any_text(leaf.annotation):
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


def _takes_any_text(annotation: Any) -> bool:
    """Whether a value may be another text than one of a choice."""
    return annotation is str or any(_takes_any_text(part) for part in get_args(annotation))


def _valid(config: dict[str, Any], *, other_than: Pipeline) -> tuple[Pipeline, Graph] | None:
    try:
        pipeline = Pipeline.model_validate(config)
        return None if pipeline == other_than else (pipeline, build_graph(pipeline))
    except (ValidationError, ConfigError):
        return None


def _digests(pipeline: Pipeline, graph: Graph) -> Iterator[tuple[TaskId, str]]:
    """Digests where each entry is a file of its own content."""
    found: dict[TaskId, str] = {}
    for task in graph.values():
        contents = {
            role: sha256_json([*entries, task.shard and task.shard.number]) for role, entries in task.files.items()
        }
        found[task.id] = digest(
            pipeline, task, inputs={name: found[name] for name in task.inputs}, file_hashes=contents
        )
        yield task.id, found[task.id]


def _differs(before: dict[TaskId, str], pipeline: Pipeline, graph: Graph) -> bool:
    """Whether the tasks or their digests are others; the first one that is ends the search."""
    return len(graph) != len(before) or any(before.get(task) != value for task, value in _digests(pipeline, graph))


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(ALL_KINDS)
    return load_pipeline(path)


@pytest.fixture(scope="module")
def flips(all_kinds: Pipeline) -> dict[str, list[tuple[str, bool]]]:
    """Of each field, the flips that were valid: where, and whether a digest changed."""
    outcome: dict[str, list[tuple[str, bool]]] = {}
    shipped = [load_pipeline(CONFIGS / f"{name}.yaml") for name in ("smoke", "your-domain")]
    for number, pipeline in enumerate([all_kinds, *shipped]):
        config, stages = pipeline.model_dump(mode="json"), list(pipeline.stages)
        before = dict(_digests(pipeline, build_graph(pipeline)))
        for leaf in _leaves(pipeline):
            if number and leaf.field in outcome and len(leaf.path) > 3 and len(outcome[leaf.field]) > 12:
                continue  # one of very many of its kind
            outcome.setdefault(leaf.field, [])
            for other in _others(leaf, stages):
                if other == leaf.value:
                    continue
                place = config
                for part in leaf.path[:-1]:
                    place = place[part]
                as_it_was = dict(place)
                place[leaf.path[-1]] = other
                changed = _valid(config, other_than=pipeline)
                place.clear()
                place.update(as_it_was)
                if changed is not None:
                    outcome[leaf.field].append((f"{'.'.join(leaf.path)}={other}", _differs(before, *changed)))
                    break
    return outcome


def _reason(field: str) -> str | None:
    return DECIDES_NOTHING.get(field) or DECIDES_NOTHING.get(f"{field.partition('.')[0]}.*")


def test_every_value_decides_a_digest_or_has_a_reason_why_not(flips: dict[str, list[tuple[str, bool]]]) -> None:
    for field, tried in flips.items():
        for where, changed in tried:
            assert changed or _reason(field), f"{where}: no task gets another digest, and there is no reason for it"


def test_every_field_has_been_flipped(flips: dict[str, list[tuple[str, bool]]]) -> None:
    kinds = {field for field in flips if field.endswith((".kind", ".engine"))}
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
    """The default that every field of a class and of those inside it was introduced with, as JSON."""
    for name, field in cls.model_fields.items():
        if (default := introduced_default(field)) is not ...:
            found[_name(cls, name)] = default
        for inner in settings_in(field.annotation):
            _defaults(inner, found)
    return found


def test_no_default_has_changed() -> None:
    """A setting at its default is in no digest: with another default, what was made with the old one would pass for made with
    the new one. A default that changes is declared by `Introduced`, and new settings are recorded by
    `python -m tests.unit.test_digests`."""
    recorded = json.loads(DEFAULTS.read_text())["defaults"]
    now = json.loads(json.dumps(_defaults(Pipeline, {})))
    assert not now.keys() - recorded.keys(), "new settings: record the defaults that they are introduced with"
    for name, default in recorded.items():
        assert now.get(name) == default or name not in now, (
            f"{name}: declare Introduced({default!r}) beside the new default"
        )


class _Inner(Settings):
    rate: float = 0.1


class _First(Settings):
    steps: int = 10
    inner: _Inner = _Inner()


class _InnerLater(Settings):
    rate: Annotated[float, Introduced(0.1)] = 0.2


class _Later(Settings):
    """With another default of each setting, and a new one."""

    steps: Annotated[int, Introduced(10)] = 20
    inner: _InnerLater = _InnerLater()
    new: int | None = None


def test_a_default_that_changes_moves_the_configs_that_leave_it_out_and_no_others() -> None:
    assert content_of(_First()) == content_of(_First(steps=10, inner=_Inner(rate=0.1))) == {}
    spelled = _Later(steps=10, inner=_InnerLater(rate=0.1))
    assert content_of(spelled) == {}, "it is what it was"
    assert content_of(_Later()) == content_of(_Later(steps=20)) == {"steps": 20, "inner": {"rate": 0.2}}
    assert content_of(_First(steps=20, inner=_Inner(rate=0.2))) == content_of(_Later()), "and equal work is found"
    assert content_of(_Later(new=1), leave_out={"steps": True, "inner": {"rate": True}}) == {"new": 1}


# --- the shipped configs ------------------------------------------------------------------------------------------------


def _known(config: Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """The digest of each task, by `stage/key`. What stands in a file is the name of the file's role."""
    pipeline = load_pipeline(config, overrides)
    found: dict[TaskId, str] = {}
    for task in build_graph(pipeline).values():
        inputs = {name: found[name] for name in task.inputs}
        found[task.id] = digest(pipeline, task, inputs=inputs, file_hashes={role: role for role in task.files})
    return {str(name): value[:16] for name, value in found.items()}


@pytest.mark.parametrize("config", [*SHIPPED, EVERY_KIND], ids=lambda config: config.stem)
def test_the_digests_of_shipped_configs_are_as_they_were(config: Path) -> None:
    """What a change of the code makes stale, it makes stale in every run folder there is, and months are made again. Where
    that is meant, or the config itself was changed, `python -m tests.unit.test_digests` records the new ones."""
    golden = GOLDEN / f"{config.stem}.txt"
    recorded = dict(line.split() for line in golden.read_text().splitlines()) if golden.exists() else {}
    now = _known(config)
    changed = {name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name)}
    graph = build_graph(load_pipeline(config))
    first = [
        str(task.id) for task in graph.values() if str(task.id) in changed and not changed & {*map(str, task.inputs)}
    ]
    assert not changed, f"{len(changed)} of {len(now)} tasks, from {first[:5]} on: python -m tests.unit.test_digests"


@pytest.mark.parametrize("config", SHIPPED, ids=lambda config: config.stem)
def test_a_config_with_every_default_spelled_out_is_the_same(config: Path, tmp_path: Path) -> None:
    resolved = tmp_path / "pipeline.yaml"
    resolved.write_text(dump_pipeline(load_pipeline(config)))
    shuffled = tmp_path / "shuffled.yaml"
    shuffled.write_text(yaml.safe_dump(yaml.safe_load(resolved.read_text()), sort_keys=True))
    assert _known(resolved) == _known(shuffled) == _known(config)


@pytest.mark.parametrize(
    "spelled",
    [
        "stages.slm.steps=1_60", "stages.slm.steps=0xA0", "stages.slm.optimizer.learning_rate=2e-3",
        "stages.slm.optimizer.learning_rate=0.0020", "stages.slm.optimizer.learning_rate=[2.0e-3]",
        "stages.slm.optimizer.clip_grad=1", "stages.slm.optimizer.weight_decay=-0", "stages.slm.lora=null",
        "stages.slm.precision=fp32", "stages.slm.schedule.final_fraction=1e-1", "training_seed=0",
        "stages.slm.optimizer={learning_rate: 2.0e-3, clip_grad: 1.0, beta2: 0.99, beta1: 0.9}",
        "text.domains.torch.train=[data/smoke/torch.train.jsonl]", "text.domains.torch.train=./data/*/torch.train.*",
        "text.domains.torch.text_field=text", "text.domains.torch.validation_floor={tokens: 2000}",
    ],
)  # fmt: skip
def test_another_spelling_is_the_same(spelled: str) -> None:
    assert _known(SMOKE, [spelled]) == _known(SMOKE)


@pytest.mark.parametrize("spelled", ["stages.slm.steps=1.6e2", 'stages.slm.optimizer.learning_rate="0.002"'])
def test_a_value_of_another_type_is_refused_not_taken_for_the_same(spelled: str) -> None:
    with pytest.raises(ConfigError, match="write a"):
        load_pipeline(SMOKE, [spelled])


def test_what_is_merged_from_an_anchor_is_what_is_written_out(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(ALL_KINDS.replace("&wide ", "").replace("*wide", str(WIDE)))
    anchored = tmp_path / "anchored.yaml"
    anchored.write_text(ALL_KINDS)
    assert "*" not in config.read_text() and _known(config) == _known(anchored)


def _record() -> None:
    """Defaults of new settings, and all digests. Recorded defaults stay: they are those that settings were introduced with."""
    defaults = {**_defaults(Pipeline, {}), **json.loads(DEFAULTS.read_text())["defaults"]}
    DEFAULTS.write_text(json.dumps({"defaults": defaults}, indent=1, sort_keys=True) + "\n")
    for config in (*SHIPPED, EVERY_KIND):
        (GOLDEN / f"{config.stem}.txt").write_text(
            "".join(f"{name} {value}\n" for name, value in _known(config).items())
        )


if __name__ == "__main__":
    _record()
