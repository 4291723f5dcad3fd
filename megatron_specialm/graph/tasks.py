"""The graph of tasks of a pipeline, derived from the fields of its stages.

A stage is one or more tasks: one per set of text (`generic` and each domain) or one for all. Of a set in shards, each
shard is a task (`tokens/generic.00003`), and the set's own task (`tokens/generic`) gathers what they made; of a training at
several learning rates, each rate is one (`graph/rates.py`). A task is named by its stage and its key, reads the artifacts of
other tasks, and has a digest over all that decides its result: its own settings, what it reads of the config beside them, its
seed, its inputs' digests and the content of the files it reads by their role; not where or on how many processes it runs, nor
how files are named. A setting at the default that it was introduced with is not in it, so that a new setting leaves what there
is as it was.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import sha256_json
from megatron_specialm.config.base import Settings
from megatron_specialm.config.schema import (
    AssignStage,
    ClusterStage,
    EmbedStage,
    EvaluateStage,
    ExportStage,
    Pipeline,
    SelectStage,
    StaticEncoder,
    TeachStage,
    TfidfEncoder,
    TokenizerStage,
    TokenizeStage,
)
from megatron_specialm.config.text import GENERIC, TextSet
from megatron_specialm.config.training import TrainStage
from megatron_specialm.estimate.capabilities import refuse
from megatron_specialm.graph.content import PLACEMENT, content_of
from megatron_specialm.graph.lineage import (
    ENCODER,
    HELD_OUT,
    assign_stage,
    domain_of,
    key_for,
    method_of,
    model_keys,
    setup_of,
    shard_keys,
    source_of,
    sources,
    text_set,
    tokenize_stage,
    train_stage,
    validates_by_cluster,
)
from megatron_specialm.graph.rates import trial_key, trial_of
from megatron_specialm.graph.relations import check_relations

# Raise it when the meaning of artifacts changes: what there is, is then made again. A default that changes is declared
# (`graph/content.py`).
ARTIFACT_FORMAT = 5
# What draws weights, an order of training data or a teacher's samples; whatever reads their work follows by its inputs.
SEEDED_AS_TRAINING = (TrainStage, SelectStage, TeachStage)
STATIC_MODEL = "package:wordllama"
TOKENIZER, ENCODING_MODEL = "tokenizer", "encoder"  # roles of files that are no text


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
    """One unit of work. `domain` is None where the work serves every domain: its cost is generic.

    files: by role (`train`, `validation`, `test`, `tokenizer`, `encoder`) the entries that it reads; of those behind `train` a
        `shard` reads a range only.
    rate: the learning rate that it tries for its stage's training.
    elsewhere: what it reads of the config beside its own stage.
    """

    id: TaskId
    inputs: tuple[TaskId, ...]
    files: Mapping[str, tuple[str, ...]]
    domain: str | None
    shard: Shard | None = None
    rate: float | None = None
    elsewhere: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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


def model_task(key: str) -> TaskId:
    """The train task behind a key `STAGE.KEY` of an export stage, or `STAGE.KEY` and `STAGE.KEY.SET` of an evaluate stage."""
    stage, train_key, *_ = key.split(".")
    return TaskId(stage, train_key)


def evaluated_set(key: str) -> str:
    """The set of text on which the task of an evaluate stage scores its model: the model's own, or the one that is named."""
    return key.rpartition(".")[2]


def ancestors(graph: Mapping[TaskId, Task], task: TaskId) -> list[TaskId]:
    """The task and everything its result rests on, in the graph's order."""
    wanted = {task}
    for candidate in reversed(list(graph)):
        if candidate in wanted:
            wanted.update(graph[candidate].inputs)
    return [candidate for candidate in graph if candidate in wanted]


def digest_content(
    pipeline: Pipeline, task: Task, *, inputs: Mapping[TaskId, str], file_hashes: Mapping[str, str]
) -> dict[str, Any]:
    """All that decides the task's result, as JSON: what its digest is the SHA-256 of (`sha256_json`).

    Args:
        inputs: the digests of the task's inputs.
        file_hashes: of each role in the task's `files`, SHA-256 of the content.
    """
    stage = pipeline.stages[task.id.stage]
    if task.rate is not None:
        assert isinstance(stage, TrainStage)
        stage = trial_of(stage, task.rate)  # other rates of the config change nothing of it
    return {
        "format": ARTIFACT_FORMAT,
        "settings": content_of(stage, leave_out=PLACEMENT),
        "elsewhere": dict(task.elsewhere),
        "key": task.id.key,
        "seed": pipeline.seed_of_training if isinstance(stage, SEEDED_AS_TRAINING) else pipeline.seed,
        "inputs": {str(name): inputs[name] for name in task.inputs},
        "files": {role: file_hashes[role] for role in task.files},
    }


def digest(pipeline: Pipeline, task: Task, *, inputs: Mapping[TaskId, str], file_hashes: Mapping[str, str]) -> str:
    """SHA-256 over all that decides the task's result; arguments as of `digest_content`."""
    return sha256_json(digest_content(pipeline, task, inputs=inputs, file_hashes=file_hashes))


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
    """Stages so that each stands behind those it names (depth first, in the config's order)."""
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
            yield Task(shard, (), {}, domain, Shard(number, len(shards)))
        yield Task(TaskId(name, source), tuple(shards), {}, domain)


def _tokenizer_tasks(pipeline: Pipeline, name: str, stage: TokenizerStage) -> Iterator[Task]:
    made = Task(TaskId(name, GENERIC), (), {}, None)
    if stage.path is not None:
        yield replace(made, files={TOKENIZER: (stage.path,)})
        return
    generic = pipeline.text.generic
    sample = {"sample": "the beginning of each file"} if generic.shards > 1 else {}  # see stages/tokenizer.py
    yield replace(made, files=_entries(generic, "train"), elsewhere={**_given(generic, "text_field"), **sample})


def _entries(files: TextSet, *roles: str) -> dict[str, tuple[str, ...]]:
    return {role: tuple(entries) for role in roles if (entries := getattr(files, role))}


def _given(files: TextSet, *names: str) -> dict[str, Any]:
    """Of a set's settings those that are not at their defaults."""
    return {name: value for name, value in content_of(files).items() if name in names}


def _tokenize_tasks(pipeline: Pipeline, name: str, stage: TokenizeStage) -> Iterator[Task]:
    tokenizer = TaskId(stage.tokenizer, GENERIC)
    for part in _parts(pipeline, name):
        files = text_set(pipeline, source_of(part.id.key))
        train = [] if part.inputs else ["train"]  # what shards have read is not read again
        held_out = [] if part.shard else ["validation", "test"]
        yield replace(
            part,
            inputs=(tokenizer, *part.inputs),
            files=_entries(files, *train, *held_out),
            elsewhere={
                **_given(files, "text_field", "train_tokens", *([] if files.validation else ["validation_floor"])),
                # Then nothing of the training files is held out. A shard does not read the validation files itself.
                **({"has_validation": True} if part.shard and files.validation else {}),
            },
        )


def _embed_tasks(pipeline: Pipeline, name: str, stage: EmbedStage) -> Iterator[Task]:
    # A window's text is what its tokens decode to. Every set is encoded by one encoder, fitted on the generic set or taken
    # from a package, which then waits for no text.
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    made, read = TaskId(name, ENCODER), (tokenizer, TaskId(stage.tokens, GENERIC))
    if isinstance(stage.encoder, TfidfEncoder):
        yield Task(made, read, {}, None)
    else:
        model = STATIC_MODEL if isinstance(stage.encoder, StaticEncoder) else stage.encoder.model
        yield Task(made, (), {ENCODING_MODEL: (model,)}, None)
    for part in _parts(pipeline, name):
        inputs = (made, tokenizer, TaskId(stage.tokens, part.id.key)) if not part.inputs else part.inputs
        yield replace(part, inputs=inputs)
    if any(assign_stage(pipeline, other).vectors == name for other in _held_out_assignments(pipeline)):
        yield Task(TaskId(name, HELD_OUT), (made, tokenizer, TaskId(stage.tokens, GENERIC)), {}, None)


def _held_out_assignments(pipeline: Pipeline) -> set[str]:
    """The assign stages by whose clusters a training is validated."""
    trainings = [stage for stage in pipeline.stages.values() if isinstance(stage, TrainStage)]
    return {stage.assignment or "" for stage in trainings if validates_by_cluster(stage)}


def _cluster_tasks(pipeline: Pipeline, name: str, stage: ClusterStage) -> Iterator[Task]:
    yield Task(TaskId(name, GENERIC), (TaskId(stage.vectors, GENERIC),), {}, None)


def _assign_tasks(pipeline: Pipeline, name: str, stage: AssignStage) -> Iterator[Task]:
    for part in _parts(pipeline, name):
        inputs = (
            (TaskId(stage.clusters, GENERIC), TaskId(stage.vectors, part.id.key)) if not part.inputs else part.inputs
        )
        yield replace(part, inputs=inputs)
    if name in _held_out_assignments(pipeline):
        inputs = (TaskId(stage.clusters, GENERIC), TaskId(stage.vectors, HELD_OUT))
        yield Task(TaskId(name, HELD_OUT), inputs, {}, None)


def _train_tasks(pipeline: Pipeline, name: str, stage: TrainStage) -> Iterator[Task]:
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    for key in model_keys(pipeline, name):
        inputs = [tokenizer, *(TaskId(stage.tokens, source) for source in text_read(stage, key))]
        if stage.assignment is not None:
            inputs.append(TaskId(stage.assignment, GENERIC))
            if stage.data == "importance":
                inputs.append(TaskId(stage.assignment, key))
            if validates_by_cluster(stage):
                inputs.append(TaskId(stage.assignment, HELD_OUT))
            if stage.data == "cluster":
                inputs.append(TaskId(assign_stage(pipeline, stage.assignment).clusters, GENERIC))
        if stage.init is not None:
            inputs.append(TaskId(stage.init, key_for(pipeline, stage.init, key)))
        if stage.distill is not None:
            inputs.append(TaskId(stage.distill.teacher, key_for(pipeline, stage.distill.teacher, key)))
        if stage.distill is not None and stage.distill.cache is not None:
            inputs.append(TaskId(stage.distill.cache, key))
        made = Task(TaskId(name, key), tuple(inputs), {}, domain_of(pipeline, key))
        rates = stage.optimizer.rates
        trials = [replace(made, id=TaskId(name, trial_key(key, rate)), rate=rate) for rate in rates if len(rates) > 1]
        yield from trials
        yield replace(made, inputs=(*made.inputs, *(trial.id for trial in trials)))


def text_read(stage: TrainStage, key: str) -> list[str]:
    """The sets whose text a training reads, the one that decides its size first."""
    if stage.data == "domain":
        return [key, GENERIC] if stage.replay_fraction else [key]
    return [GENERIC, key] if stage.domain_fraction else [GENERIC]


def text_validated(stage: TrainStage, key: str) -> str:
    """The set on whose held-out text early stopping validates: a domain's for whatever reads the domain's text."""
    return text_read(stage, key)[-1 if stage.domain_fraction else 0]


def _select_tasks(pipeline: Pipeline, name: str, stage: SelectStage) -> Iterator[Task]:
    experts = train_stage(pipeline, stage.experts)
    assert experts.assignment is not None
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    models = [TaskId(stage.experts, key) for key in model_keys(pipeline, stage.experts)]
    for domain in pipeline.text.domains:
        inputs = (tokenizer, TaskId(stage.tokens, domain), TaskId(experts.assignment, domain), *models)
        yield Task(TaskId(name, domain), inputs, {}, domain)


def _teach_tasks(pipeline: Pipeline, name: str, stage: TeachStage) -> Iterator[Task]:
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    for domain in pipeline.text.domains:
        teacher = TaskId(stage.teacher, key_for(pipeline, stage.teacher, domain))
        yield Task(TaskId(name, domain), (tokenizer, TaskId(stage.tokens, domain), teacher), {}, domain)


def _evaluate_tasks(pipeline: Pipeline, name: str, stage: EvaluateStage) -> Iterator[Task]:
    for model in stage.models:
        for key in model_keys(pipeline, model):
            # A shared model is scored on each domain by a task of its own, so that another domain adds one and touches none.
            for source in sources(pipeline) if key == GENERIC else [key]:
                own = f"{model}.{key}" if source == key else f"{model}.{key}.{source}"
                inputs = (TaskId(model, key), TaskId(stage.tokens, source))
                yield Task(TaskId(name, own), inputs, {}, domain_of(pipeline, source))


def _export_tasks(pipeline: Pipeline, name: str, stage: ExportStage) -> Iterator[Task]:
    tokenizer = TaskId(tokenize_stage(pipeline, stage.tokens).tokenizer, GENERIC)
    for model in stage.models:
        for key in model_keys(pipeline, model):
            inputs = (TaskId(model, key), tokenizer, TaskId(stage.tokens, key))
            card = {"method": method_of(pipeline, model)}
            yield Task(TaskId(name, f"{model}.{key}"), inputs, {}, domain_of(pipeline, key), elsewhere=card)


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
