"""The graph of tasks of a pipeline: stages in the order in which they read each other, and the tasks of each; and what a stage
and those whose models it reads must have in common, which is known before anything runs."""

from collections.abc import Sequence

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.lineage import experts_of, key_for, model_keys, tokenizer_of, tokenizer_task
from megatron_specialm.graph.stage_kind import KINDS, kind_of
from megatron_specialm.graph.tasks import Task, TaskId


def build_graph(pipeline: Pipeline) -> dict[TaskId, Task]:
    """All tasks in an order in which every input stands before its reader.

    Raises:
        ConfigError: a field names a stage that is missing or of the wrong kind, the stages form a cycle, or do not go together,
            or a training asks for what its engine cannot do.
    """
    stages = {name: pipeline.stages[name] for name in _stage_order(pipeline)}
    for name, stage in stages.items():
        kind_of(stage).check(pipeline, name, stage)
    return {task.id: task for name, stage in stages.items() for task in kind_of(stage).tasks(pipeline, name, stage)}


def _stage_order(pipeline: Pipeline) -> list[str]:
    """Stages so that each stands behind those it names (depth first, in the config's order)."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " -> ".join((*path[path.index(name) :], name))
            raise ConfigError(f"stages: {cycle} is a cycle: a stage cannot read what is made from it")
        if name in done:
            return
        for field, other in kind_of(pipeline.stages[name]).named_stages(pipeline.stages[name]):
            _check_reference(pipeline, name, field, other)
            visit(other, (*path, name))
        done.append(name)

    for name in pipeline.stages:
        visit(name, ())
    return done


def _check_reference(pipeline: Pipeline, name: str, field: str, other: str) -> None:
    if other not in pipeline.stages:
        raise ConfigError(f"stages.{name}.{field}: no stage {other!r}; there are {', '.join(pipeline.stages)}")
    wanted = kind_of(pipeline.stages[name]).references[field]
    found = kind_of(pipeline.stages[other])
    if not found.provides(wanted):
        kinds = " or ".join(repr(kind.kind) for kind in KINDS.values() if kind.provides(wanted))
        raise ConfigError(f"stages.{name}.{field}: {other!r} is a stage of kind {found.kind!r}, not {kinds}")


def check_tokenizer(pipeline: Pipeline, name: str, tokens: str, model: str) -> None:
    """Weights mean nothing under another tokenizer, even where its size is the same.

    Args:
        tokens: the tokenize stage that the stage `name` reads.
        model: the stage whose models it reads.

    Raises:
        ConfigError: naming both tokenizers and the fix.
    """
    own, theirs = tokenizer_task(pipeline, tokens).stage, tokenizer_of(pipeline, model).stage
    if own != theirs:
        raise ConfigError(
            f"stages.{name}.tokens: they are of tokenizer `{own}`, and the weights of `{model}` of tokenizer "
            f"`{theirs}`: name tokens that `{theirs}` has made, {{kind: tokenize, tokenizer: {theirs}}}"
        )


def check_model(
    pipeline: Pipeline, name: str, field: str, tokens: str, model: str, *, keys: Sequence[str] | None = None
) -> None:
    """Check that a stage can read the models of another, each of which is one model.

    Args:
        field: the field of the stage `name` that names `model`.
        tokens: the tokenize stage that it reads.
        keys: the keys of its tasks, each of which reads the model of its key or the one for all domains; None where its tasks
            follow from the models.

    Raises:
        ConfigError: naming the key, both values and the fix.
    """
    check_tokenizer(pipeline, name, tokens, model)
    if (experts := experts_of(pipeline, model)) is not None:
        raise ConfigError(
            f"stages.{name}.{field}: {model!r} is {experts}, not one model: choose one with a stage "
            f"{{kind: select, experts: {model}, ...}}, and name that"
        )
    # A training for all domains, or of a cluster's expert, can read no model of one domain.
    if key := next(
        (key for key in keys or () if key_for(pipeline, model, key) not in model_keys(pipeline, model)), None
    ):
        raise ConfigError(
            f"stages.{name}.{field}: {model!r} is made for each domain, and {name!r} is not ({name}/{key}): name a stage "
            "that serves all domains, or set `data: domain`"
        )
