"""A task: one unit of work of a stage, named by its stage and its key.

A stage has one task per set of text (`generic` and each domain), per model, or one for all. Of a set in shards each shard is a
task (`tokens/generic.00003`), and the set's own task (`tokens/generic`) gathers what they made; of a training at several
learning rates each rate is one (`graph/rates.py`). `graph/kinds/` says which tasks a stage has, `graph/build.py` puts them in
order, `graph/digests.py` says what decides their results.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TOKENIZER, ENCODING_MODEL, CHECKPOINT = "tokenizer", "encoder", "checkpoint"
MODELS = (TOKENIZER, ENCODING_MODEL, CHECKPOINT)  # roles of files that are not text


class TaskId(NamedTuple):
    """`stage/key`: the artifact's folder below the run folder."""

    stage: str
    key: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.key}"


class Shard(NamedTuple):
    """Which range of a set's files: its number, from 0, and how many ranges there are."""

    number: int
    shards: int


@dataclass(frozen=True)
class Task:
    """One unit of work. `domain` is None where the work serves every domain: its cost is generic.

    files: by role (`train`, `validation`, `test`, `tokenizer`, `encoder`, `checkpoint`) the entries that it reads; of those
        behind `train` a `shard` reads a range only.
    rate: the learning rate that it tries for its stage's training.
    elsewhere: settings outside its own stage that it reads.
    """

    id: TaskId
    inputs: tuple[TaskId, ...]
    files: Mapping[str, tuple[str, ...]]
    domain: str | None
    shard: Shard | None = None
    rate: float | None = None
    elsewhere: Mapping[str, Any] = field(default_factory=dict)


def model_task(key: str) -> TaskId:
    """The train or select task behind a key `STAGE.KEY` of an export stage, or `STAGE.KEY` and `STAGE.KEY.SET` of an evaluate
    stage."""
    stage, train_key, *_ = key.split(".")
    return TaskId(stage, train_key)


def evaluated_set(key: str) -> str:
    """The set of text on which the task of an evaluate stage scores its model: the model's own, or the one that is named."""
    return key.rpartition(".")[2]


def ancestors(graph: Mapping[TaskId, Task], *tasks: TaskId) -> list[TaskId]:
    """Tasks and everything their results rest on, in the graph's order."""
    wanted = set(tasks)
    for candidate in reversed(list(graph)):
        if candidate in wanted:
            wanted.update(graph[candidate].inputs)
    return [candidate for candidate in graph if candidate in wanted]
