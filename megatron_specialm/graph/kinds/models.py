"""The kinds that make models: `import`, `train` and `select`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import ValidationError

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.schema import EmbedStage, ImportStage, Pipeline, SelectStage, TeachStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.config.training import TrainStage
from megatron_specialm.estimate.capabilities import refuse
from megatron_specialm.graph.build import check_model, check_tokenizer
from megatron_specialm.graph.digests import content_of
from megatron_specialm.graph.length import shared_steps, why_another_step, without_length
from megatron_specialm.graph.lineage import (
    HELD_OUT,
    assign_stage,
    cluster_count,
    domain_of,
    expert_key,
    experts_of,
    first_models,
    key_for,
    model_keys,
    model_of,
    setup_of,
    stage_of,
    starts_from_mixture,
    tokenizer_task,
    train_stage,
    trained_clusters,
    trial_setup_of,
    validates_by_cluster,
)
from megatron_specialm.graph.rates import trial_key, trial_of
from megatron_specialm.graph.stage_kind import DomainText, ModelKind, Placement, References, register
from megatron_specialm.graph.tasks import CHECKPOINT, TOKENIZER, Task, TaskId


@register
class ImportKind(ModelKind[ImportStage]):
    """One task, which takes a model and its tokenizer from files."""

    kind = "import"
    also_makes = "tokenizer"
    placement: ClassVar[Placement] = {
        "path": True, "revision": True, "config": True, "tokenizer": True,  # the content is in the digest, wherever it is
        "method": True,  # a name in tables and on model cards: it is in the export's digest
    }  # fmt: skip

    def tasks(self, pipeline: Pipeline, name: str, stage: ImportStage) -> Iterator[Task]:
        files = {CHECKPOINT: (stage.source, *([stage.config] if stage.config else []))}
        tokenizer = {TOKENIZER: (stage.tokenizer,)} if stage.tokenizer else {}
        yield Task(TaskId(name, GENERIC), (), {**files, **tokenizer}, None)

    def keys(self, pipeline: Pipeline, name: str, stage: ImportStage) -> list[str]:
        return [GENERIC]

    def shape(self, pipeline: Pipeline, stage: ImportStage) -> ModelConfig:
        return stage.model

    def start(self, stage: ImportStage) -> None:
        return None

    def origin(self, stage: ImportStage) -> str:
        return f"not trained here: imported from `{stage.source}`"


@register
class TrainKind(ModelKind[TrainStage]):
    """A task for each model, and one more for each learning rate where several are tried."""

    kind = "train"
    references: ClassVar[References] = {
        "tokens": "tokens", "assignment": "assignment", "init": "model", "continues": "model", "distill.teacher": "model",
        "distill.cache": "distributions",
    }  # fmt: skip
    placement: ClassVar[Placement] = {
        "runtime": True,
        "parallel": True, "micro_batch_size": True, "packing": True, "checkpoint": True, "log_every": True, "tensorboard": True,
        "wandb_project": True,
        "clusters": True,  # other experts decide nothing about one of them
        "method": True,  # a name in tables and on model cards: it is in the export's digest
    }  # fmt: skip
    ranks_by = "any"
    saves_steps = True
    uses_training_seed = True

    def tasks(self, pipeline: Pipeline, name: str, stage: TrainStage) -> Iterator[Task]:
        tokenizer = tokenizer_task(pipeline, stage.tokens)
        elsewhere = _micro_batch(self.shape(pipeline, stage), stage.micro_batch_size)
        for key in model_keys(pipeline, name):
            inputs = [tokenizer, *(TaskId(stage.tokens, source) for source in stage.text_read(key))]
            if (assignment := stage.clustering) is not None:
                inputs.append(TaskId(assignment, GENERIC))
                if stage.data == "importance":
                    inputs.append(TaskId(assignment, key))
                if validates_by_cluster(stage):
                    inputs.append(TaskId(assignment, HELD_OUT))
                if stage.data == "cluster":
                    inputs.append(TaskId(assign_stage(pipeline, assignment).clusters, GENERIC))
            inputs += first_models(pipeline, stage, key)
            if stage.distill is not None:
                inputs.append(TaskId(stage.distill.teacher, key_for(pipeline, stage.distill.teacher, key)))
                if stage.distill.cache is not None:
                    inputs.append(TaskId(stage.distill.cache, key))
            continued = TaskId(stage.continues, key) if stage.continues is not None else None
            inputs += [continued] if continued else []
            domain = domain_of(pipeline, key)
            made = Task(TaskId(name, key), tuple(inputs), {}, domain, elsewhere=elsewhere, continues=continued)
            rates = stage.optimizer.rates
            trials = [replace(made, id=TaskId(name, trial_key(key, rate)), rate=rate) for rate in rates if rates[1:]]
            yield from trials
            yield replace(made, inputs=(*made.inputs, *(trial.id for trial in trials)))

    def check(self, pipeline: Pipeline, name: str, stage: TrainStage) -> None:
        if stage.continues is not None:
            _check_continued(pipeline, name, stage, stage.continues)
        for field, other in self.named_stages(stage):
            of_many = field == "continues" or (field == "init" and starts_from_mixture(pipeline, stage))
            if self.references[field] == "model" and not of_many:
                check_model(pipeline, name, field, stage.tokens, other, keys=model_keys(pipeline, name))
        _check_shape(name, model_of(pipeline, name))
        if stage.upcycle is not None:
            _check_upcycling(pipeline, name, stage, stage.upcycle)
        if stage.clustering is not None:
            _check_clusters(pipeline, name, stage, stage.clustering)
        if stage.distill is not None and stage.distill.cache is not None:
            _check_cache(pipeline, name, stage)
        refuse(name, setup_of(pipeline, name))

    def processes(self, stage: TrainStage) -> int:
        return stage.parallel.world_size

    def digested(self, stage: TrainStage, task: Task) -> TrainStage:
        """Of a trial those at its rate: the other rates of the config change nothing of it."""
        return stage if task.rate is None else trial_of(stage, task.rate)

    def validated_sets(self, pipeline: Pipeline, name: str, stage: TrainStage) -> set[str]:
        if stage.early_stopping is None:
            return set()
        return {stage.text_validated(key) for key in model_keys(pipeline, name)}

    def keys(self, pipeline: Pipeline, name: str, stage: TrainStage) -> list[str]:
        """One per domain also where it starts from a domain's weights."""
        if stage.data == "cluster":
            return [expert_key(cluster) for cluster in trained_clusters(pipeline, name)]
        per_domain = stage.data != "generic" or stage.mixes_in_domain
        if stage.init is not None and not starts_from_mixture(pipeline, stage):
            per_domain |= model_keys(pipeline, stage.init) != [GENERIC]
        return list(pipeline.text.domains) if per_domain else [GENERIC]

    def shape(self, pipeline: Pipeline, stage: TrainStage) -> ModelConfig:
        """What it starts from is merged first: one expert, without adapters."""
        if stage.model is not None:
            return stage.model.model_copy(update={"projection": stage.network and stage.network.projection})
        assert stage.init is not None
        base = model_of(pipeline, stage.init).base_config
        return base.model_copy(update={"lora": stage.lora, "moe": stage.upcycle or base.moe})

    def start(self, stage: TrainStage) -> str | None:
        return stage.init

    def domain_text(self, stage: TrainStage) -> DomainText:
        return "fine-tuned" if stage.data == "domain" else "mixed in" if stage.mixes_in_domain else "none"

    def origin(self, stage: TrainStage) -> str:
        mixed = "domain" if stage.mixes_in_domain else GENERIC
        return f"{stage.data}+{mixed}" if stage.mixed_fraction else stage.data


def _check_continued(pipeline: Pipeline, name: str, stage: TrainStage, continued: str) -> None:
    """Check that a training and the one that it continues differ in their length only, and have a step in common."""
    where, other = f"stages.{name}.continues", pipeline.stages[continued]
    if not isinstance(other, TrainStage):
        raise ConfigError(f"{where}: {continued!r} is a stage of kind {other.kind!r}, not 'train'")
    own, theirs = (without_length(content_of(each, leave_out=TrainKind.placement)) for each in (stage, other))
    if different := sorted(key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key)):
        raise ConfigError(
            f"{where}: {continued!r} has another `{different[0]}` ({theirs.get(different[0])!r}, and {name!r} has "
            f"{own.get(different[0])!r}): only `steps` and `schedule` may differ"
        )
    if missing := [key for key in model_keys(pipeline, name) if key not in model_keys(pipeline, continued)]:
        raise ConfigError(f"{where}: {continued!r} has no model {missing[0]!r}: train the same clusters in both")
    if not shared_steps(stage, other, ended=other.steps):
        reason = why_another_step(min(stage.steps, other.steps), stage, other)
        raise ConfigError(
            f"{where}: no step of {continued!r} that is kept is a step of {name!r} ({reason}): use `schedule.kind: wsd` or "
            "`constant`, and equal `warmup_steps`"
        )


def _check_shape(name: str, shape: ModelConfig) -> None:
    """Check the shape that follows from that of `init`, with `lora` or `upcycle`, as one that is given."""
    try:
        ModelConfig.model_validate(shape.model_dump())
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"stages.{name}: {reason}") from None


def _check_upcycling(pipeline: Pipeline, name: str, stage: TrainStage, moe: MixtureOfExperts) -> None:
    assert stage.init is not None
    dense, where = model_of(pipeline, stage.init), f"stages.{name}.upcycle"
    if dense.moe is not None:
        raise ConfigError(f"{where}: {stage.init!r} is an MoE already: drop `upcycle`")
    if moe.ffn_hidden_size not in (None, dense.ffn_hidden_size):
        raise ConfigError(
            f"{where}.ffn_hidden_size: {moe.ffn_hidden_size}, and the feed-forward parts of {stage.init!r} have "
            f"{dense.ffn_hidden_size}: drop it"
        )
    if starts_from_mixture(pipeline, stage):
        check_tokenizer(pipeline, name, stage.tokens, stage.init)
        models = len(model_keys(pipeline, stage.init))
        if wrong := [count for count in moe.counts if count % models]:
            raise ConfigError(
                f"{where}.experts: {wrong[0]}, and {stage.init!r} has {models} models, each of which becomes equally many "
                f"experts: give a multiple of {models}"
            )


def _check_clusters(pipeline: Pipeline, name: str, stage: TrainStage, assignment: str) -> None:
    vectors = stage_of(pipeline, assign_stage(pipeline, assignment).vectors, EmbedStage)
    if vectors.tokens != stage.tokens:
        raise ConfigError(
            f"stages.{name}.tokens: {stage.tokens}, and `{assignment}` has the clusters of the windows of "
            f"`{vectors.tokens}`: set them equal, or name another assign stage"
        )
    k = cluster_count(pipeline, assignment)
    if (network := stage.network) is not None and network.experts != k:
        raise ConfigError(
            f"stages.{name}.{network.field}: {network.experts}, and `{assignment}` has {k} clusters: "
            "an expert is a cluster's, so set them equal"
        )
    for cluster in trained_clusters(pipeline, name) if stage.data == "cluster" else ():
        if cluster >= k:
            raise ConfigError(
                f"stages.{name}.clusters: {cluster} does not exist: `{assignment}` has clusters 0 to {k - 1}"
            )


def _check_cache(pipeline: Pipeline, name: str, stage: TrainStage) -> None:
    distill = stage.distill
    assert distill is not None and distill.cache is not None
    cache = stage_of(pipeline, distill.cache, TeachStage)
    for field, own, theirs in (
        ("distill.teacher", distill.teacher, cache.teacher),
        ("tokens", stage.tokens, cache.tokens),
        ("distill.temperature", distill.temperature, cache.temperature),
    ):
        if own != theirs:
            raise ConfigError(
                f"stages.{name}.{field}: {own}, and the cache `{distill.cache}` was made with {theirs}: set them equal, or "
                "name another cache"
            )


@register
class SelectKind(ModelKind[SelectStage]):
    """A task for each domain, which takes one of the experts of another stage."""

    kind = "select"
    references: ClassVar[References] = {"tokens": "tokens", "experts": "model"}
    placement: ClassVar[Placement] = {
        "batch_size": True, "trial": {"micro_batch_size": True, "packing": True},
        "method": True,  # a name in tables and on model cards: it is in the export's digest
    }  # fmt: skip
    uses_training_seed = True

    def tasks(self, pipeline: Pipeline, name: str, stage: SelectStage) -> Iterator[Task]:
        assignment = train_stage(pipeline, stage.experts).clustering
        assert assignment is not None
        models = [TaskId(stage.experts, key) for key in model_keys(pipeline, stage.experts)]
        trial = stage.trial
        elsewhere = _micro_batch(self.shape(pipeline, stage), trial.micro_batch_size) if trial is not None else {}
        for domain in pipeline.text.domains:
            read = (TaskId(stage.tokens, domain), TaskId(assignment, domain), *models)
            inputs = (tokenizer_task(pipeline, stage.tokens), *read)
            yield Task(TaskId(name, domain), inputs, {}, domain, elsewhere=elsewhere)

    def check(self, pipeline: Pipeline, name: str, stage: SelectStage) -> None:
        check_tokenizer(pipeline, name, stage.tokens, stage.experts)
        experts = experts_of(pipeline, stage.experts)
        if experts is None:
            raise ConfigError(
                f"stages.{name}.experts: {stage.experts!r} makes one model: name a train stage with `data: cluster`, "
                "`projection` or `moe.route: cluster`"
            )
        if stage.by == "histogram" and experts != "a projected network":
            raise ConfigError(
                f"stages.{name}.by: histogram mixes the codes of a projected network, and {stage.experts!r} is {experts}: "
                "choose another criterion"
            )
        if stage.trial is not None:
            refuse(f"{name}.trial", trial_setup_of(pipeline, stage))

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


def _micro_batch(model: ModelConfig, size: int) -> dict[str, Any]:
    """The size of a micro-batch as a setting that a task reads (`Task.elsewhere`), or nothing: it decides a result only where
    an MoE balances or drops the tokens of a micro-batch together."""
    return {"micro_batch_size": size} if model.moe is not None and model.moe.depends_on_micro_batch else {}
