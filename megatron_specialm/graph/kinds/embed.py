"""The kind `embed`: a task that makes the encoder, and one for each set of text, or for each shard of one and one that gathers
them. Where a training is validated by clusters, one more embeds the generic set's held-out windows."""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from megatron_specialm.config.schema import EmbedStage, Pipeline, StaticEncoder, TfidfEncoder
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import (
    ENCODER,
    HELD_OUT,
    assign_stage,
    held_out_assignments,
    tokenizer_task,
)
from megatron_specialm.graph.stage_kind import Placement, References, StageKind, register
from megatron_specialm.graph.tasks import ENCODING_MODEL, Task, TaskId
from megatron_specialm.graph.text_tasks import text_tasks

STATIC_MODEL = "package:wordllama"


@register
class EmbedKind(StageKind[EmbedStage]):
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
