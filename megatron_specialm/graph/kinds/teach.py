"""The kind `teach`: a task for each domain, which writes the teacher's distributions on its training windows."""

from collections.abc import Iterator
from typing import ClassVar

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.schema import Pipeline, TeachStage, TokenizerStage
from megatron_specialm.graph.lineage import key_for, stage_of, tokenizer_task
from megatron_specialm.graph.relations import check_model
from megatron_specialm.graph.stage_kind import Placement, References, StageKind, register
from megatron_specialm.graph.tasks import Task, TaskId


@register
class TeachKind(StageKind[TeachStage]):
    kind = "teach"
    makes = "distributions"
    references: ClassVar[References] = {"tokens": "tokens", "teacher": "model"}
    placement: ClassVar[Placement] = {"batch_size": True}
    uses_training_seed = True

    def tasks(self, pipeline: Pipeline, name: str, stage: TeachStage) -> Iterator[Task]:
        tokenizer = tokenizer_task(pipeline, stage.tokens)
        for domain in pipeline.text.domains:
            teacher = TaskId(stage.teacher, key_for(pipeline, stage.teacher, domain))
            yield Task(TaskId(name, domain), (tokenizer, TaskId(stage.tokens, domain), teacher), {}, domain)

    def check(self, pipeline: Pipeline, name: str, stage: TeachStage) -> None:
        check_model(pipeline, name, "teacher", stage.tokens, stage.teacher, keys=list(pipeline.text.domains))
        tokenizer = stage_of(pipeline, tokenizer_task(pipeline, stage.tokens).stage, TokenizerStage)
        if stage.keep == "top-k" and tokenizer.path is None and (stage.count or 0) > tokenizer.vocabulary_size:
            raise ConfigError(
                f"stages.{name}.count: {stage.count} of a vocabulary of {tokenizer.vocabulary_size}: at most as many, or "
                "`keep: exact`"
            )
