"""The kind `select`: a task for each domain, which takes one of the experts of another stage."""

from collections.abc import Iterator
from typing import ClassVar

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.schema import Pipeline, SelectStage
from megatron_specialm.graph.lineage import experts_of, model_keys, model_of, tokenizer_task, train_stage
from megatron_specialm.graph.micro_batch import micro_batch
from megatron_specialm.graph.relations import check_tokenizer
from megatron_specialm.graph.stage_kind import ModelKind, Placement, References, register
from megatron_specialm.graph.tasks import Task, TaskId


@register
class SelectKind(ModelKind[SelectStage]):
    kind = "select"
    references: ClassVar[References] = {"tokens": "tokens", "experts": "model"}
    placement: ClassVar[Placement] = {
        "batch_size": True, "trial": {"micro_batch_size": True},
        "method": True,  # a name in tables and on model cards: it is in the export's digest
    }  # fmt: skip
    uses_training_seed = True

    def tasks(self, pipeline: Pipeline, name: str, stage: SelectStage) -> Iterator[Task]:
        assignment = train_stage(pipeline, stage.experts).clustering
        assert assignment is not None
        models = [TaskId(stage.experts, key) for key in model_keys(pipeline, stage.experts)]
        trial = stage.trial
        elsewhere = micro_batch(self.shape(pipeline, stage), trial.micro_batch_size) if trial is not None else {}
        for domain in pipeline.text.domains:
            read = (TaskId(stage.tokens, domain), TaskId(assignment, domain), *models)
            inputs = (tokenizer_task(pipeline, stage.tokens), *read)
            yield Task(TaskId(name, domain), inputs, {}, domain, elsewhere=elsewhere)

    def check(self, pipeline: Pipeline, name: str, stage: SelectStage) -> None:
        check_tokenizer(pipeline, name, stage.tokens, stage.experts)
        experts = experts_of(pipeline, stage.experts)
        if experts is None:
            raise ConfigError(
                f"stages.{name}.experts: {stage.experts!r} makes one model: name a train stage with `data: cluster` or "
                "`projection`"
            )
        if stage.by == "histogram" and experts != "a projected network":
            raise ConfigError(
                f"stages.{name}.by: histogram mixes the codes of a projected network, and {stage.experts!r} is {experts}: "
                "choose another criterion"
            )

    def validated_sets(self, pipeline: Pipeline, name: str, stage: SelectStage) -> set[str]:
        return set(pipeline.text.domains) if stage.tries_experts else set()

    def keys(self, pipeline: Pipeline, name: str, stage: SelectStage) -> list[str]:
        return list(pipeline.text.domains)

    def shape(self, pipeline: Pipeline, stage: SelectStage) -> ModelConfig:
        return model_of(pipeline, stage.experts).base_config

    def start(self, stage: SelectStage) -> str:
        return stage.experts

    def origin(self, stage: SelectStage) -> str:
        return stage.by
