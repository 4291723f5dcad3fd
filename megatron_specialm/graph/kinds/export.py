"""The kind `export`: a task for each model."""

from collections.abc import Iterator
from typing import ClassVar

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.schema import ExportStage, Pipeline
from megatron_specialm.graph.lineage import domain_of, method_of, model_keys, model_of, tokenizer_task
from megatron_specialm.graph.relations import check_model
from megatron_specialm.graph.stage_kind import Placement, References, StageKind, register
from megatron_specialm.graph.tasks import Task, TaskId


@register
class ExportKind(StageKind[ExportStage]):
    kind = "export"
    makes = "export"
    references: ClassVar[References] = {"tokens": "tokens", "models": "model"}
    placement: ClassVar[Placement] = {"models": True}  # other models decide nothing about one of them

    def tasks(self, pipeline: Pipeline, name: str, stage: ExportStage) -> Iterator[Task]:
        tokenizer = tokenizer_task(pipeline, stage.tokens)
        for model in stage.models:
            for key in model_keys(pipeline, model):
                inputs = (TaskId(model, key), tokenizer, TaskId(stage.tokens, key))
                card = {"method": method_of(pipeline, model)}
                yield Task(TaskId(name, f"{model}.{key}"), inputs, {}, domain_of(pipeline, key), elsewhere=card)

    def check(self, pipeline: Pipeline, name: str, stage: ExportStage) -> None:
        for model in stage.models:
            check_model(pipeline, name, "models", stage.tokens, model)
            if (refusal := model_of(pipeline, model).export_refusal) is not None:
                raise ConfigError(
                    f"stages.{name}.models: {model!r} cannot be exported: {refusal}. Or leave it out: its canonical weights "
                    f"are safetensors in {pipeline.root}/{model}/KEY/step_N"
                )
