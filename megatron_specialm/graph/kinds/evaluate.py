"""The kind `evaluate`: a task for each model and set of text that it is scored on."""

from collections.abc import Iterator
from typing import ClassVar

from megatron_specialm.config.schema import EvaluateStage, Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import domain_of, model_keys, sources
from megatron_specialm.graph.relations import check_model
from megatron_specialm.graph.stage_kind import Placement, References, StageKind, register
from megatron_specialm.graph.tasks import Task, TaskId


@register
class EvaluateKind(StageKind[EvaluateStage]):
    kind = "evaluate"
    makes = "perplexity"
    references: ClassVar[References] = {"tokens": "tokens", "models": "model"}
    # Which other models there are decides nothing about one of them.
    placement: ClassVar[Placement] = {"batch_size": True, "models": True}

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
