"""What tokenize, embed and assign stages have in common: a task for each set of text, in shards or as a whole."""

from collections.abc import Iterator
from typing import Any

from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import TextSet
from megatron_specialm.graph.content import content_of
from megatron_specialm.graph.lineage import domain_of, shard_keys, sources
from megatron_specialm.graph.tasks import Shard, Task, TaskId


def text_tasks(pipeline: Pipeline, name: str) -> Iterator[Task]:
    """A task for each set, or for each shard of one and, with these as its inputs, for the set itself."""
    for source in sources(pipeline):
        domain, shards = domain_of(pipeline, source), [TaskId(name, key) for key in shard_keys(pipeline, source)]
        for number, shard in enumerate(shards):
            yield Task(shard, (), {}, domain, Shard(number, len(shards)))
        yield Task(TaskId(name, source), tuple(shards), {}, domain)


def entries_of(files: TextSet, *roles: str) -> dict[str, tuple[str, ...]]:
    """The entries of a set by role (`train`, `validation`, `test`), without roles that have none."""
    return {role: tuple(entries) for role in roles if (entries := getattr(files, role))}


def settings_given(files: TextSet, *names: str) -> dict[str, Any]:
    """Those of a set's settings that are not at their defaults."""
    return {name: value for name, value in content_of(files).items() if name in names}
