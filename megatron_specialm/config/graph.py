"""The graph of tasks of a pipeline, derived from the fields of its stages.

A stage is one or more tasks: one per set of text (`generic` and each domain) or one for all. Of a set in shards, each
shard is a task (`tokens/generic.00003`), and the set's own task (`tokens/generic`) gathers what they made. A task
is named by its stage and its key, reads the artifacts of other tasks, and has a digest over all that decides its result:
its own settings, the seed, its inputs' digests and the content of the files it reads; not where or on how many processes
it runs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import sha256_json
from megatron_specialm.config.base import Settings
from megatron_specialm.config.capabilities import refuse
from megatron_specialm.config.lineage import (
    ENCODER,
    assign_stage,
    domain_of,
    key_for,
    model_keys,
    setup_of,
    shard_keys,
    source_of,
    sources,
    text_set,
    tokenize_stage,
    train_stage,
)
from megatron_specialm.config.relations import check_relations
from megatron_specialm.config.schema import (
    AssignStage,
    ClusterStage,
    EmbedStage,
    EvaluateStage,
    ExportStage,
    Pipeline,
    SelectStage,
    SentenceBertEncoder,
    TeachStage,
    TfidfEncoder,
    TokenizerStage,
    TokenizeStage,
)
from megatron_specialm.config.text import GENERIC
from megatron_specialm.config.training import TrainStage

# Settings that say where, in what portions and how talkatively a task runs, not what it computes.
PLACEMENT: dict[str, Any] = {
    "parallel": True, "workers": True, "micro_batch_size": True, "batch_size": True, "trial": {"micro_batch_size"},
    "processes": True, "checkpoint": True, "log_every": True, "tensorboard": True, "wandb_project": True,
    "models": True, "clusters": True,  # which models or experts there are says nothing of one of them, and inputs are named
}  # fmt: skip
ARTIFACT_FORMAT = 3  # raise it when the meaning of an artifact changes: older ones are then made again


class TaskId(NamedTuple):
    """`stage/key`: the artifact's folder below the run folder."""

    stage: str
    key: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.key}"


class Shard(NamedTuple):
    """Which range of a set's files: the one of this number, from 0, of so many ranges."""

    number: int
    shards: int


@dataclass(frozen=True)
class Task:
    """One unit of work. `domain` is None where the work serves every domain: its cost is generic. Of the files behind the
    entries `files`, a `shard` reads a range only."""

    id: TaskId
    inputs: tuple[TaskId, ...]
    files: tuple[str, ...]
    domain: str | None
    shard: Shard | None = None

    @property
    def contents(self) -> tuple[str, ...]:
        """What the task reads, by the names under which its digest has their hashes: the entries, or the range of them."""
        if self.shard is None or not self.files:
            return self.files
        return (f"{' '.join(self.files)} [{self.shard.number + 1}/{self.shard.shards}]",)


def build_graph(pipeline: Pipeline) -> dict[TaskId, Task]:
    """All tasks in an order in which every input stands before its reader.

    Raises:
        ConfigError: a field names a stage that is missing or of the wrong kind, the stages form a cycle, or a training
            asks for what its engine cannot do.
    """
    order = _stage_order(pipeline)
    for name in order:
        check_relations(pipeline, name)
        if isinstance(pipeline.stages[name], TrainStage):
            refuse(name, setup_of(pipeline, name))
    return {task.id: task for name in order for task in _tasks(pipeline, name)}


def model_task(pipeline: Pipeline, key: str) -> TaskId:
    """The train task behind a key `STAGE.KEY` of an evaluate or export stage."""
    stage, _, train_key = key.rpartition(".")
    return TaskId(stage, train_key)


def ancestors(graph: Mapping[TaskId, Task], task: TaskId) -> list[TaskId]:
    """The task and everything its result rests on, in the graph's order."""
    wanted = {task}
    for candidate in reversed(list(graph)):
        if candidate in wanted:
            wanted.update(graph[candidate].inputs)
    return [candidate for candidate in graph if candidate in wanted]


def digest(pipeline: Pipeline, task: Task, *, inputs: Mapping[TaskId, str], file_hashes: Mapping[str, str]) -> str:
    """SHA-256 over all that decides the task's result.

    Args:
        inputs: the digests of the task's inputs.
        file_hashes: SHA-256 of each of the task's `contents`.
    """
    stage = pipeline.stages[task.id.stage]
    content = {
        "format": ARTIFACT_FORMAT,
        "settings": stage.model_dump(mode="json", exclude=PLACEMENT),
        "key": task.id.key,
        "seed": pipeline.seed,
        "inputs": {str(name): inputs[name] for name in task.inputs},
        "files": {name: file_hashes[name] for name in task.contents},
    }
    size = text_set(pipeline, source_of(task.id.key)).train_tokens if isinstance(stage, TokenizeStage) else None
    if size is not None:  # absent where there is none, so that sets which were never cut keep their digests
        content["train_tokens"] = size
    if isinstance(stage, TokenizerStage) and stage.path is None and pipeline.text.generic.shards > 1:
        content["sample"] = "the beginning of each file"  # see stages/tokenizer.py
    return sha256_json(content)


# --- what each kind reads ---------------------------------------------------------------------------------------------

# The fields of each kind that name stages, with the kinds each may be of.
_Kinds = type[Settings] | tuple[type[Settings], ...]
MODELS = (TrainStage, SelectStage)
REFERENCES: dict[type[Settings], dict[str, _Kinds]] = {
    TokenizerStage: {},
    TokenizeStage: {"tokenizer": TokenizerStage},
    EmbedStage: {"tokens": TokenizeStage},
    ClusterStage: {"vectors": EmbedStage},
    AssignStage: {"clusters": ClusterStage, "vectors": EmbedStage},
    TrainStage: {
        "tokens": TokenizeStage, "assignment": AssignStage, "init": MODELS,
        "distill.teacher": MODELS, "distill.cache": TeachStage,
    },
    SelectStage: {"tokens": TokenizeStage, "experts": TrainStage},
    TeachStage: {"tokens": TokenizeStage, "teacher": MODELS},
    EvaluateStage: {"tokens": TokenizeStage, "models": MODELS},
    ExportStage: {"tokens": TokenizeStage, "models": MODELS},
}  # fmt: skip


def _stage_order(pipeline: Pipeline) -> list[str]:
    """Stages so that each stands behind those it names (depth first, in the page's order)."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " -> ".join((*path[path.index(name) :], name))
            raise ConfigError(f"stages: {cycle} is a cycle: a stage cannot read what is made from it")
        if name in done:
            return
        for _, other in _named_stages(pipeline, name):
            visit(other, (*path, name))
        done.append(name)

    for name in pipeline.stages:
        visit(name, ())
    return done


def _named_stages(pipeline: Pipeline, name: str) -> Iterator[tuple[str, str]]:
    """The (field, stage) pairs that a stage names, each checked to exist and to be of the right kind."""
    stage = pipeline.stages[name]
    for field, expected in REFERENCES[type(stage)].items():
        value: Any = stage
        for part in field.split("."):
            value = getattr(value, part, None)
        for other in value if isinstance(value, list) else [value] if value is not None else []:
            if other not in pipeline.stages:
                raise ConfigError(f"stages.{name}.{field}: no stage {other!r}; there are {', '.join(pipeline.stages)}")
            if not isinstance(pipeline.stages[other], expected):
                classes = expected if isinstance(expected, tuple) else (expected,)
                wanted = " or ".join(repr(get_args(cls.model_fields["kind"].annotation)[0]) for cls in classes)
                raise ConfigError(
                    f"stages.{name}.{field}: {other!r} is a stage of kind {pipeline.stages[other].kind!r}, not {wanted}"
                )
            yield field, other


def _tasks(pipeline: Pipeline, name: str) -> Iterator[Task]:
    stage = pipeline.stages[name]
    yield from _TASKS[type(stage)](pipeline, name, stage)


def _parts(pipeline: Pipeline, name: str) -> Iterator[Task]:
    """A task for each set, or for each shard of one and, with these as its inputs, for the set that they are of."""
    for source in sources(pipeline):
        domain, shards = domain_of(pipeline, source), [TaskId(name, key) for key in shard_keys(pipeline, source)]
        for number, shard in enumerate(shards):
            yield Task(shard, (), (), domain, Shard(number, len(shards)))
        yield Task(TaskId(name, source), tuple(shards), (), domain)


def _tokenizer_tasks(pipeline: Pipeline, name: str, stage: TokenizerStage) -> Iterator[Task]:
    files = tuple(pipeline.text.generic.train) if stage.path is None else (stage.path,)
    yield Task(TaskId(name, GENERIC), (), files, None)


def _tokenize_tasks(pipeline: Pipeline, name: str, stage: TokenizeStage) -> Iterator[Task]:
    tokenizer = TaskId(stage.tokenizer, GENERIC)
    for part in _parts(pipeline, name):
        files = text_set(pipeline, source_of(part.id.key))
        train = [] if part.inputs else files.train  # what shards have read is not read again
        held_out = [] if part.shard else [*files.validation, *files.test]
        yield replace(part, inputs=(tokenizer, *part.inputs), files=(*train, *held_out))


def _embed_tasks(pipeline: Pipeline, name: str, stage: EmbedStage) -> Iterator[Task]:
    # A window's text is what its tokens decode to. Every set is encoded by one encoder, fitted on the generic set or taken
    # from a package, which then waits for no text.
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    encoder = stage.encoder
    # A model in a local folder is known by its content; one in a package or on a hub by its name.
    files = (encoder.model,) if isinstance(encoder, SentenceBertEncoder) and Path(encoder.model).is_dir() else ()
    made, read = TaskId(name, ENCODER), (tokenizer, TaskId(stage.tokens, GENERIC))
    yield Task(made, read if isinstance(encoder, TfidfEncoder) else (), files, None)
    for part in _parts(pipeline, name):
        inputs = (made, tokenizer, TaskId(stage.tokens, part.id.key)) if not part.inputs else part.inputs
        yield replace(part, inputs=inputs)


def _cluster_tasks(pipeline: Pipeline, name: str, stage: ClusterStage) -> Iterator[Task]:
    yield Task(TaskId(name, GENERIC), (TaskId(stage.vectors, GENERIC),), (), None)


def _assign_tasks(pipeline: Pipeline, name: str, stage: AssignStage) -> Iterator[Task]:
    for part in _parts(pipeline, name):
        inputs = (
            (TaskId(stage.clusters, GENERIC), TaskId(stage.vectors, part.id.key)) if not part.inputs else part.inputs
        )
        yield replace(part, inputs=inputs)


def _train_tasks(pipeline: Pipeline, name: str, stage: TrainStage) -> Iterator[Task]:
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    for key in model_keys(pipeline, name):
        inputs = [tokenizer, *(TaskId(stage.tokens, source) for source in text_read(stage, key))]
        if stage.assignment is not None:
            inputs.append(TaskId(stage.assignment, GENERIC))
            if stage.data == "importance":
                inputs.append(TaskId(stage.assignment, key))
            if stage.data == "cluster":
                inputs.append(TaskId(assign_stage(pipeline, stage.assignment).clusters, GENERIC))
        if stage.init is not None:
            inputs.append(TaskId(stage.init, key_for(pipeline, stage.init, key)))
        if stage.distill is not None:
            inputs.append(TaskId(stage.distill.teacher, key_for(pipeline, stage.distill.teacher, key)))
        if stage.distill is not None and stage.distill.cache is not None:
            inputs.append(TaskId(stage.distill.cache, key))
        yield Task(TaskId(name, key), tuple(inputs), (), domain_of(pipeline, key))


def text_read(stage: TrainStage, key: str) -> list[str]:
    """The sets whose text a training reads, the one that decides its size first."""
    if stage.data == "domain":
        return [key, GENERIC] if stage.replay_fraction else [key]
    return [GENERIC, key] if stage.domain_fraction else [GENERIC]


def _select_tasks(pipeline: Pipeline, name: str, stage: SelectStage) -> Iterator[Task]:
    experts = train_stage(pipeline, stage.experts)
    assert experts.assignment is not None
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    models = [TaskId(stage.experts, key) for key in model_keys(pipeline, stage.experts)]
    for domain in pipeline.text.domains:
        inputs = (tokenizer, TaskId(stage.tokens, domain), TaskId(experts.assignment, domain), *models)
        yield Task(TaskId(name, domain), inputs, (), domain)


def _teach_tasks(pipeline: Pipeline, name: str, stage: TeachStage) -> Iterator[Task]:
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    for domain in pipeline.text.domains:
        teacher = TaskId(stage.teacher, key_for(pipeline, stage.teacher, domain))
        yield Task(TaskId(name, domain), (tokenizer, TaskId(stage.tokens, domain), teacher), (), domain)


def _evaluate_tasks(pipeline: Pipeline, name: str, stage: EvaluateStage) -> Iterator[Task]:
    for model in stage.models:
        for key in model_keys(pipeline, model):
            sets = sources(pipeline) if key == GENERIC else [key]
            tokens = tuple(TaskId(stage.tokens, source) for source in sets)
            inputs = (TaskId(model, key), *tokens)
            yield Task(TaskId(name, f"{model}.{key}"), inputs, (), domain_of(pipeline, key))


def _export_tasks(pipeline: Pipeline, name: str, stage: ExportStage) -> Iterator[Task]:
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    for model in stage.models:
        for key in model_keys(pipeline, model):
            inputs = (TaskId(model, key), tokenizer, TaskId(stage.tokens, key))
            yield Task(TaskId(name, f"{model}.{key}"), inputs, (), domain_of(pipeline, key))


_TASKS: dict[type[Settings], Callable[[Pipeline, str, Any], Iterator[Task]]] = {
    TokenizerStage: _tokenizer_tasks,
    TokenizeStage: _tokenize_tasks,
    EmbedStage: _embed_tasks,
    ClusterStage: _cluster_tasks,
    AssignStage: _assign_tasks,
    TrainStage: _train_tasks,
    SelectStage: _select_tasks,
    TeachStage: _teach_tasks,
    EvaluateStage: _evaluate_tasks,
    ExportStage: _export_tasks,
}
