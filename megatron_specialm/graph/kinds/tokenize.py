"""The kind `tokenize`: a task for each set of text, or for each shard of one and one that gathers them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

from megatron_specialm.config.schema import Pipeline, TokenizeStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import source_of, text_set
from megatron_specialm.graph.stage_kind import Placement, References, StageKind, register
from megatron_specialm.graph.tasks import Task, TaskId
from megatron_specialm.graph.text_tasks import entries_of, settings_given, text_tasks


@register
class TokenizeKind(StageKind[TokenizeStage]):
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
