"""The graph of tasks of a pipeline: stages in the order in which they read each other, and the tasks of each."""

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.schema import Pipeline
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
    if found.makes != wanted:
        kinds = " or ".join(repr(kind.kind) for kind in KINDS.values() if kind.makes == wanted)
        raise ConfigError(f"stages.{name}.{field}: {other!r} is a stage of kind {found.kind!r}, not {kinds}")
