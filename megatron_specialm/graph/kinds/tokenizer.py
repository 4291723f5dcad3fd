"""The kind `tokenizer`: one task, which trains a tokenizer on the generic set or takes an existing one."""

from collections.abc import Iterator
from typing import ClassVar

from megatron_specialm.config.schema import Pipeline, TokenizerStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.stage_kind import Placement, StageKind, register
from megatron_specialm.graph.tasks import TOKENIZER, Task, TaskId
from megatron_specialm.graph.text_tasks import entries_of, settings_given


@register
class TokenizerKind(StageKind[TokenizerStage]):
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
