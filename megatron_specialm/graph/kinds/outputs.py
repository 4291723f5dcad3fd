"""The kinds that read models and make none: `teach`, `evaluate` and `export`."""

from collections.abc import Iterator
from typing import ClassVar

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.schema import EvaluateStage, ExportStage, Pipeline, TeachStage, TokenizerStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.build import check_model
from megatron_specialm.graph.lineage import (
    domain_of,
    key_for,
    method_of,
    model_keys,
    model_of,
    sources,
    tokenizer_task,
    vocabulary_size,
)
from megatron_specialm.graph.stage_kind import Placement, References, StageKind, register
from megatron_specialm.graph.tasks import Task, TaskId


@register
class TeachKind(StageKind[TeachStage]):
    """A task for each domain, which writes the teacher's distributions on its training windows."""

    kind = "teach"
    makes = "distributions"
    references: ClassVar[References] = {"tokens": "tokens", "teacher": "model"}
    placement: ClassVar[Placement] = {"batch_size": True, "packing": True}
    uses_training_seed = True

    def tasks(self, pipeline: Pipeline, name: str, stage: TeachStage) -> Iterator[Task]:
        tokenizer = tokenizer_task(pipeline, stage.tokens)
        for domain in pipeline.text.domains:
            teacher = TaskId(stage.teacher, key_for(pipeline, stage.teacher, domain))
            yield Task(TaskId(name, domain), (tokenizer, TaskId(stage.tokens, domain), teacher), {}, domain)

    def check(self, pipeline: Pipeline, name: str, stage: TeachStage) -> None:
        check_model(pipeline, name, "teacher", stage.tokens, stage.teacher, keys=list(pipeline.text.domains))
        tokenizer = pipeline.stages[tokenizer_task(pipeline, stage.tokens).stage]
        size = vocabulary_size(pipeline, stage.tokens)
        is_from_files = isinstance(tokenizer, TokenizerStage) and tokenizer.path is not None
        if stage.keep == "top-k" and not is_from_files and (stage.count or 0) > size:
            raise ConfigError(
                f"stages.{name}.count: {stage.count} of a vocabulary of {size}: at most as many, or `keep: exact`"
            )


@register
class EvaluateKind(StageKind[EvaluateStage]):
    """A task for each model and set of text that it is scored on."""

    kind = "evaluate"
    makes = "perplexity"
    references: ClassVar[References] = {"tokens": "tokens", "models": "model"}
    # Which other models there are decides nothing about one of them.
    placement: ClassVar[Placement] = {"batch_size": True, "packing": True, "models": True}

    def tasks(self, pipeline: Pipeline, name: str, stage: EvaluateStage) -> Iterator[Task]:
        for model in stage.models:
            for key in model_keys(pipeline, model):
                # A model for all domains has a task for each set, so that a new domain leaves the others done.
                for source in sources(pipeline) if key == GENERIC else [key]:
                    own = f"{model}.{key}" if source == key else f"{model}.{key}.{source}"
                    inputs = (TaskId(model, key), TaskId(stage.tokens, source))
                    yield Task(TaskId(name, own), inputs, {}, domain_of(pipeline, source))

    def check(self, pipeline: Pipeline, name: str, stage: EvaluateStage) -> None:
        for model in stage.models:
            check_model(pipeline, name, "models", stage.tokens, model)


@register
class ExportKind(StageKind[ExportStage]):
    """A task for each model."""

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
