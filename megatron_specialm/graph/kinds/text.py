"""The kinds that prepare text: `tokenizer`, `tokenize`, `embed`, `cluster` and `assign`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from megatron_specialm.config.schema import (
    AssignStage,
    ClusterStage,
    EmbedStage,
    Pipeline,
    StaticEncoder,
    TfidfEncoder,
    TokenizerStage,
    TokenizeStage,
)
from megatron_specialm.config.text import GENERIC, TextSet
from megatron_specialm.graph.digests import content_of
from megatron_specialm.graph.lineage import (
    ENCODER,
    HELD_OUT,
    assign_stage,
    domain_of,
    held_out_assignments,
    shard_keys,
    source_of,
    sources,
    text_set,
    tokenizer_task,
)
from megatron_specialm.graph.stage_kind import Placement, References, StageKind, register
from megatron_specialm.graph.tasks import ENCODING_MODEL, TOKENIZER, Shard, Task, TaskId

STATIC_MODEL = "package:wordllama"


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


@register
class TokenizerKind(StageKind[TokenizerStage]):
    """One task, which trains a tokenizer on the generic set or takes an existing one."""

    kind = "tokenizer"
    makes = "tokenizer"
    placement: ClassVar[Placement] = {"path": True}  # the file's content is in the digest, wherever it is

    def tasks(self, pipeline: Pipeline, name: str, stage: TokenizerStage) -> Iterator[Task]:
        if stage.path is not None:
            yield Task(TaskId(name, GENERIC), (), {TOKENIZER: (stage.path,)}, None)
            return
        generic = pipeline.text.generic
        sample = {"sample": "the beginning of each file"} if generic.shards > 1 else {}  # see stages/tokenizer.py
        elsewhere = {**settings_given(generic, "text_field"), **sample}
        yield Task(TaskId(name, GENERIC), (), entries_of(generic, "train"), None, elsewhere=elsewhere)


@register
class TokenizeKind(StageKind[TokenizeStage]):
    """A task for each set of text, or for each shard of one and one that gathers them."""

    kind = "tokenize"
    makes = "tokens"
    references: ClassVar[References] = {"tokenizer": "tokenizer"}
    placement: ClassVar[Placement] = {"workers": True}

    def tasks(self, pipeline: Pipeline, name: str, stage: TokenizeStage) -> Iterator[Task]:
        tokenizer = TaskId(stage.tokenizer, GENERIC)
        for task in text_tasks(pipeline, name):
            files = text_set(pipeline, source_of(task.id.key))
            train = [] if task.inputs else ["train"]  # what shards have read is not read again
            held_out = [] if task.shard else ["validation", "test"]
            yield replace(
                task,
                inputs=(tokenizer, *task.inputs),
                files=entries_of(files, *train, *held_out),
                elsewhere={
                    **settings_given(
                        files, "text_field", "train_tokens", *([] if files.validation else ["validation_floor"])
                    ),
                    # Then nothing of the training files is held out. A shard does not read the validation files itself.
                    **({"has_validation": True} if task.shard and files.validation else {}),
                },
            )


@register
class EmbedKind(StageKind[EmbedStage]):
    """A task that makes the encoder, and one for each set of text, or for each shard of one and one that gathers them. Where a
    training is validated by clusters, one more embeds the generic set's held-out windows."""

    kind = "embed"
    makes = "vectors"
    references: ClassVar[References] = {"tokens": "tokens"}
    placement: ClassVar[Placement] = {"encoder": {"model": True}}  # its content is in the digest, wherever it is

    def tasks(self, pipeline: Pipeline, name: str, stage: EmbedStage) -> Iterator[Task]:
        # A window's text is what its tokens decode to. Every set is encoded by one encoder, fitted on the generic set or
        # taken from a package, which then waits for no text.
        tokenizer, made = tokenizer_task(pipeline, stage.tokens), TaskId(name, ENCODER)
        if isinstance(stage.encoder, TfidfEncoder):
            yield Task(made, (tokenizer, TaskId(stage.tokens, GENERIC)), {}, None)
        else:
            model = STATIC_MODEL if isinstance(stage.encoder, StaticEncoder) else stage.encoder.model
            yield Task(made, (), {ENCODING_MODEL: (model,)}, None)
        for task in text_tasks(pipeline, name):
            yield replace(task, inputs=task.inputs or (made, tokenizer, TaskId(stage.tokens, task.id.key)))
        if any(assign_stage(pipeline, other).vectors == name for other in held_out_assignments(pipeline)):
            yield Task(TaskId(name, HELD_OUT), (made, tokenizer, TaskId(stage.tokens, GENERIC)), {}, None)


@register
class ClusterKind(StageKind[ClusterStage]):
    """One task, which fits centroids to the generic set's vectors."""

    kind = "cluster"
    makes = "clusters"
    references: ClassVar[References] = {"vectors": "vectors"}
    placement: ClassVar[Placement] = {"processes": True}
    ranks_by = "mpi"  # k-means adds over MPI, whatever launches trainings

    def tasks(self, pipeline: Pipeline, name: str, stage: ClusterStage) -> Iterator[Task]:
        yield Task(TaskId(name, GENERIC), (TaskId(stage.vectors, GENERIC),), {}, None)

    def processes(self, stage: ClusterStage) -> int:
        return stage.processes


@register
class AssignKind(StageKind[AssignStage]):
    """A task for each set of text, or for each shard of one and one that gathers them. Where a training is validated by
    clusters, one more assigns the generic set's held-out windows."""

    kind = "assign"
    makes = "assignment"
    references: ClassVar[References] = {"clusters": "clusters", "vectors": "vectors"}
    placement: ClassVar[Placement] = {"clusters": True}  # an input, which the digest has by name

    def tasks(self, pipeline: Pipeline, name: str, stage: AssignStage) -> Iterator[Task]:
        clusters = TaskId(stage.clusters, GENERIC)
        for task in text_tasks(pipeline, name):
            yield replace(task, inputs=task.inputs or (clusters, TaskId(stage.vectors, task.id.key)))
        if name in held_out_assignments(pipeline):
            yield Task(TaskId(name, HELD_OUT), (clusters, TaskId(stage.vectors, HELD_OUT)), {}, None)
