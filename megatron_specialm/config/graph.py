"""The graph of tasks of a pipeline, derived from the fields of its stages.

A stage is one or more tasks: one per set of text (`generic` and each domain) or one for all. A task is named by its stage
and its key, reads the artifacts of other tasks, and has a digest over all that decides its result: its own settings, the
seed, its inputs' digests and the content of the files it reads; not where or on how many processes it runs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import sha256_json
from megatron_specialm.config.base import Settings
from megatron_specialm.config.capabilities import refuse
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.schema import (
    GENERIC,
    AssignStage,
    ClusterStage,
    EmbedStage,
    EvaluateStage,
    ExportStage,
    Pipeline,
    SentenceBertEncoder,
    TextSet,
    TokenizerStage,
    TokenizeStage,
    TrainStage,
)
from megatron_specialm.config.setup import Setup

# Settings that say where, in what portions and how talkatively a task runs, not what it computes.
PLACEMENT = {"parallel", "workers", "micro_batch_size", "checkpoint", "log_every", "tensorboard", "wandb_project"}
ARTIFACT_FORMAT = 1  # raise it when the meaning of an artifact changes: older ones are then made again


class TaskId(NamedTuple):
    """`stage/key`: the artifact's folder below the run folder."""

    stage: str
    key: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.key}"


@dataclass(frozen=True)
class Task:
    """One unit of work. `domain` is None where the work serves every domain: its cost is generic."""

    id: TaskId
    inputs: tuple[TaskId, ...]
    files: tuple[str, ...]
    domain: str | None


def build_graph(pipeline: Pipeline) -> dict[TaskId, Task]:
    """All tasks in an order in which every input stands before its reader.

    Raises:
        ConfigError: a field names a stage that is missing or of the wrong kind, the stages form a cycle, or a training
            asks for what its engine cannot do.
    """
    order = _stage_order(pipeline)
    for name in order:
        if isinstance(pipeline.stages[name], TrainStage):
            refuse(name, setup_of(pipeline, name))
        _check_tokenizers(pipeline, name)
    return {task.id: task for name in order for task in _tasks(pipeline, name)}


def _check_tokenizers(pipeline: Pipeline, name: str) -> None:
    """Weights mean nothing under another tokenizer, even where its size is the same."""
    stage = pipeline.stages[name]
    models = stage.models if isinstance(stage, EvaluateStage | ExportStage) else [getattr(stage, "init", None)]
    for model in filter(None, models):
        own, theirs = (_tokenizer_of(pipeline, user) for user in (name, model))
        if own != theirs:
            raise ConfigError(
                f"stages.{name}.tokens: they are of tokenizer `{own}`, and the weights of `{model}` of tokenizer "
                f"`{theirs}`: name tokens that `{theirs}` has made"
            )


def _tokenizer_of(pipeline: Pipeline, name: str) -> str:
    stage = pipeline.stages[name]
    assert isinstance(stage, TrainStage | EvaluateStage | ExportStage)
    tokens = pipeline.stages[stage.tokens]
    assert isinstance(tokens, TokenizeStage)
    return tokens.tokenizer


def sources(pipeline: Pipeline) -> list[str]:
    """The keys of the sets of text: `generic`, then the domains."""
    return [GENERIC, *pipeline.text.domains]


def text_set(pipeline: Pipeline, source: str) -> TextSet:
    """The files of one set."""
    return pipeline.text.generic if source == GENERIC else pipeline.text.domains[source]


def train_keys(pipeline: Pipeline, name: str) -> list[str]:
    """The keys of a train stage: one for everybody, or one per domain (also when it starts from a domain's weights)."""
    stage = train_stage(pipeline, name)
    per_domain = stage.data != "generic" or (stage.init is not None and train_keys(pipeline, stage.init) != [GENERIC])
    return list(pipeline.text.domains) if per_domain else [GENERIC]


def train_stage(pipeline: Pipeline, name: str) -> TrainStage:
    """The train stage of that name, which the graph has checked."""
    stage = pipeline.stages[name]
    assert isinstance(stage, TrainStage)
    return stage


def model_of(pipeline: Pipeline, name: str) -> ModelConfig:
    """The model shape of a train stage, through `init` to where it was given."""
    stage = train_stage(pipeline, name)
    if stage.model is not None:
        return stage.model
    assert stage.init is not None
    return model_of(pipeline, stage.init)


def setup_of(pipeline: Pipeline, name: str) -> Setup:
    """What a train stage asks of its engine."""
    stage = train_stage(pipeline, name)
    tokens = pipeline.stages[stage.tokens]
    assert isinstance(tokens, TokenizeStage)
    tokenizer = pipeline.stages[tokens.tokenizer]
    assert isinstance(tokenizer, TokenizerStage)
    return Setup(
        model_of(pipeline, name),
        stage.parallel,
        stage.precision,
        tokenizer.vocabulary_size,
        tokens.context_length,
        stage.global_batch_size,
        stage.micro_batch_size,
        stage.fp8,
    )


def distinct_setups(pipeline: Pipeline, name: str | None) -> dict[str, Setup]:
    """The named train stage and its setup, or one stage for each setup that the page has.

    Raises:
        ConfigError: there is no train stage of that name.
    """
    names = [other for other, stage in pipeline.stages.items() if isinstance(stage, TrainStage)]
    if name is not None and name not in names:
        raise ConfigError(f"--stage {name}: no train stage of that name; there are {', '.join(names)}")
    setups: dict[str, Setup] = {}
    for other in names if name is None else [name]:
        setup = setup_of(pipeline, other)
        if setup not in setups.values():
            setups[other] = setup
    return setups


def method_of(pipeline: Pipeline, name: str) -> str:
    """The method's name in tables: given, or inherited from the stage it starts from, or the stage's own name."""
    stage = train_stage(pipeline, name)
    return stage.method or (method_of(pipeline, stage.init) if stage.init else name)


def is_finetuned(pipeline: Pipeline, name: str) -> bool:
    """Whether a model has been trained on the domain's own text."""
    stage = train_stage(pipeline, name)
    return stage.data == "domain" or (stage.init is not None and is_finetuned(pipeline, stage.init))


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
        file_hashes: SHA-256 of the content of each of the task's files.
    """
    stage = pipeline.stages[task.id.stage]
    content = {
        "format": ARTIFACT_FORMAT,
        "settings": stage.model_dump(mode="json", exclude=PLACEMENT),
        "key": task.id.key,
        "seed": pipeline.seed,
        "inputs": {str(name): inputs[name] for name in task.inputs},
        "files": {name: file_hashes[name] for name in task.files},
    }
    size = text_set(pipeline, task.id.key).train_tokens if isinstance(stage, TokenizeStage) else None
    if size is not None:  # absent where there is none, so that sets which were never cut keep their digests
        content["train_tokens"] = size
    return sha256_json(content)


# --- what each kind reads ---------------------------------------------------------------------------------------------

# The fields of each kind that name stages, with the kind each must be of.
REFERENCES: dict[type[Settings], dict[str, type[Settings]]] = {
    TokenizerStage: {},
    TokenizeStage: {"tokenizer": TokenizerStage},
    EmbedStage: {"tokens": TokenizeStage},
    ClusterStage: {"vectors": EmbedStage},
    AssignStage: {"clusters": ClusterStage, "vectors": EmbedStage},
    TrainStage: {"tokens": TokenizeStage, "assignment": AssignStage, "init": TrainStage},
    EvaluateStage: {"tokens": TokenizeStage, "models": TrainStage},
    ExportStage: {"tokens": TokenizeStage, "models": TrainStage},
}


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
        value = getattr(stage, field)
        for other in value if isinstance(value, list) else [value] if value is not None else []:
            if other not in pipeline.stages:
                raise ConfigError(f"stages.{name}.{field}: no stage {other!r}; there are {', '.join(pipeline.stages)}")
            if not isinstance(pipeline.stages[other], expected):
                wanted = get_args(expected.model_fields["kind"].annotation)[0]
                raise ConfigError(
                    f"stages.{name}.{field}: {other!r} is a stage of kind {pipeline.stages[other].kind!r}, not {wanted!r}"
                )
            yield field, other


def _tasks(pipeline: Pipeline, name: str) -> Iterator[Task]:
    stage = pipeline.stages[name]
    yield from _TASKS[type(stage)](pipeline, name, stage)


def _domain(key: str) -> str | None:
    return None if key == GENERIC else key


def _tokenizer_tasks(pipeline: Pipeline, name: str, stage: TokenizerStage) -> Iterator[Task]:
    files = tuple(pipeline.text.generic.train) if stage.path is None else (stage.path,)
    yield Task(TaskId(name, GENERIC), (), files, None)


def _tokenize_tasks(pipeline: Pipeline, name: str, stage: TokenizeStage) -> Iterator[Task]:
    for source in sources(pipeline):
        files = text_set(pipeline, source)
        everything = (*files.train, *files.validation, *files.test)
        yield Task(TaskId(name, source), (TaskId(stage.tokenizer, GENERIC),), everything, _domain(source))


def _embed_tasks(pipeline: Pipeline, name: str, stage: EmbedStage) -> Iterator[Task]:
    # A window's text is what its tokens decode to. A domain's encoder is the one the generic task fitted or loaded.
    tokenize = pipeline.stages[stage.tokens]
    assert isinstance(tokenize, TokenizeStage)
    tokenizer = TaskId(tokenize.tokenizer, GENERIC)
    encoder = stage.encoder
    # A model in a local folder is known by its content; one in a package or on a hub by its name.
    files = (encoder.model,) if isinstance(encoder, SentenceBertEncoder) and Path(encoder.model).is_dir() else ()
    for source in sources(pipeline):
        fitted = () if source == GENERIC else (TaskId(name, GENERIC),)
        yield Task(TaskId(name, source), (tokenizer, TaskId(stage.tokens, source), *fitted), files, _domain(source))


def _cluster_tasks(pipeline: Pipeline, name: str, stage: ClusterStage) -> Iterator[Task]:
    yield Task(TaskId(name, GENERIC), (TaskId(stage.vectors, GENERIC),), (), None)


def _assign_tasks(pipeline: Pipeline, name: str, stage: AssignStage) -> Iterator[Task]:
    for source in sources(pipeline):
        yield Task(
            TaskId(name, source), (TaskId(stage.clusters, GENERIC), TaskId(stage.vectors, source)), (), _domain(source)
        )


def _train_tasks(pipeline: Pipeline, name: str, stage: TrainStage) -> Iterator[Task]:
    tokenize = pipeline.stages[stage.tokens]
    assert isinstance(tokenize, TokenizeStage)
    for key in train_keys(pipeline, name):
        tokens_of = key if stage.data == "domain" else GENERIC
        inputs = [TaskId(tokenize.tokenizer, GENERIC), TaskId(stage.tokens, tokens_of)]
        if stage.assignment is not None:
            inputs += [TaskId(stage.assignment, GENERIC), TaskId(stage.assignment, key)]
        if stage.init is not None:
            inputs.append(TaskId(stage.init, _key_for(pipeline, stage.init, key)))
        yield Task(TaskId(name, key), tuple(inputs), (), _domain(key))


def _key_for(pipeline: Pipeline, name: str, key: str) -> str:
    return key if key in train_keys(pipeline, name) else GENERIC


def _evaluate_tasks(pipeline: Pipeline, name: str, stage: EvaluateStage) -> Iterator[Task]:
    for model in stage.models:
        for key in train_keys(pipeline, model):
            sets = sources(pipeline) if key == GENERIC else [key]
            tokens = tuple(TaskId(stage.tokens, source) for source in sets)
            yield Task(TaskId(name, f"{model}.{key}"), (TaskId(model, key), *tokens), (), _domain(key))


def _export_tasks(pipeline: Pipeline, name: str, stage: ExportStage) -> Iterator[Task]:
    tokenize = pipeline.stages[stage.tokens]
    assert isinstance(tokenize, TokenizeStage)
    for model in stage.models:
        for key in train_keys(pipeline, model):
            inputs = (TaskId(model, key), TaskId(tokenize.tokenizer, GENERIC), TaskId(stage.tokens, key))
            yield Task(TaskId(name, f"{model}.{key}"), inputs, (), _domain(key))


_TASKS: dict[type[Settings], Callable[[Pipeline, str, Any], Iterator[Task]]] = {
    TokenizerStage: _tokenizer_tasks,
    TokenizeStage: _tokenize_tasks,
    EmbedStage: _embed_tasks,
    ClusterStage: _cluster_tasks,
    AssignStage: _assign_tasks,
    TrainStage: _train_tasks,
    EvaluateStage: _evaluate_tasks,
    ExportStage: _export_tasks,
}
