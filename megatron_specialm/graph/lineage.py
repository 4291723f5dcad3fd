"""What the stages of a pipeline are for each other: which sets of text there are, what a stage's models are, for whom, of which
shape and method, and from which weights. The answers follow from the config alone; `graph/build.py` checks that fields name
stages of the right kind."""

from dataclasses import replace
from typing import Any, TypeVar, get_args

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.base import Settings
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.schema import (
    AssignStage,
    ClusterStage,
    ImportStage,
    Pipeline,
    SelectStage,
    TokenizerStage,
    TokenizeStage,
)
from megatron_specialm.config.text import GENERIC, TextSet
from megatron_specialm.config.training import TrainStage
from megatron_specialm.config.trainings import ClusterTraining
from megatron_specialm.estimate.packing_capabilities import best_packing
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.graph.stage_kind import DomainText, ModelKind, kind_of
from megatron_specialm.graph.tasks import TaskId

S = TypeVar("S", bound=Settings)

# Keys that no domain can have as a name: of the task that makes an embed stage's encoder, and of those that embed and assign
# the generic set's held-out windows, where a training is validated by their clusters.
ENCODER = f"{GENERIC}.encoder"
HELD_OUT = f"{GENERIC}.validation"


def sources(pipeline: Pipeline) -> list[str]:
    """The sets of text: `generic`, then the domains."""
    return [GENERIC, *pipeline.text.domains]


def text_set(pipeline: Pipeline, source: str) -> TextSet:
    """The files of one set."""
    return pipeline.text.generic if source == GENERIC else pipeline.text.domains[source]


def shard_keys(pipeline: Pipeline, source: str) -> list[str]:
    """The keys of a set's shards, `generic.00000`, ...; none where the set is prepared as a whole."""
    shards = text_set(pipeline, source).shards
    return [f"{source}.{number:05d}" for number in range(shards)] if shards > 1 else []


def source_of(key: str) -> str:
    """The set of text that a key belongs to, `generic` for `generic.00003`; or the model, `legal` for `legal.rate-0.0017`.
    Names of domains have no dot."""
    return key.partition(".")[0]


def domain_of(pipeline: Pipeline, key: str) -> str | None:
    """The domain that a task's key names; None for `generic` and for a cluster, whose cost is generic."""
    return key if key in pipeline.text.domains else None


def stage_of(pipeline: Pipeline, name: str, settings: type[S]) -> S:
    """The stage of that name, which has settings of this class."""
    stage = pipeline.stages[name]
    assert isinstance(stage, settings)
    return stage


def train_stages(pipeline: Pipeline) -> dict[str, TrainStage]:
    """All train stages, by name."""
    return {name: stage for name, stage in pipeline.stages.items() if isinstance(stage, TrainStage)}


def train_stage(pipeline: Pipeline, name: str) -> TrainStage:
    return stage_of(pipeline, name, TrainStage)


def tokenize_stage(pipeline: Pipeline, name: str) -> TokenizeStage:
    return stage_of(pipeline, name, TokenizeStage)


def assign_stage(pipeline: Pipeline, name: str) -> AssignStage:
    return stage_of(pipeline, name, AssignStage)


def tokenizer_task(pipeline: Pipeline, tokens: str) -> TaskId:
    """The task that makes the tokenizer of a tokenize stage."""
    return TaskId(tokenize_stage(pipeline, tokens).tokenizer, GENERIC)


def tokenizer_of(pipeline: Pipeline, name: str) -> TaskId:
    """The task that makes the tokenizer of a stage's models: its own, where it reads no tokens."""
    kind, stage = _model_stage(pipeline, name)
    tokens = dict(kind.named_stages(stage)).get("tokens")
    return TaskId(name, GENERIC) if tokens is None else tokenizer_task(pipeline, tokens)


def vocabulary_size(pipeline: Pipeline, tokens: str) -> int:
    """Rows of an embedding for a tokenize stage, as the config says. A tokenizer from files may have another number."""
    tokenizer = pipeline.stages[tokenize_stage(pipeline, tokens).tokenizer]
    assert isinstance(tokenizer, TokenizerStage | ImportStage)
    return tokenizer.vocabulary_size


def cluster_count(pipeline: Pipeline, assignment: str) -> int:
    """K, the number of clusters of an assign stage."""
    return stage_of(pipeline, assign_stage(pipeline, assignment).clusters, ClusterStage).k


def expert_key(cluster: int) -> str:
    return f"c{cluster}"


def cluster_of(key: str) -> int:
    """The cluster whose expert a key names."""
    return int(key.removeprefix("c"))


def _model_stage(pipeline: Pipeline, name: str) -> tuple[ModelKind[Any], Any]:
    """A stage that makes models, behind its kind."""
    stage = pipeline.stages[name]
    kind = kind_of(stage)
    assert isinstance(kind, ModelKind)
    return kind, stage


def model_keys(pipeline: Pipeline, name: str) -> list[str]:
    """The keys of the models that a stage makes: `generic` for one that serves all domains, one key per cluster, or one per
    domain."""
    kind, stage = _model_stage(pipeline, name)
    return kind.keys(pipeline, name, stage)


def key_for(pipeline: Pipeline, name: str, key: str) -> str:
    """Which of a stage's models serves a key: its own, or the one for all domains."""
    return key if key in model_keys(pipeline, name) else GENERIC


def trained_clusters(pipeline: Pipeline, name: str) -> list[int]:
    """The clusters for which a mixture, or one model with an expert per cluster, has experts."""
    stage = train_stage(pipeline, name)
    assert stage.clustering is not None
    chosen = stage.clusters if isinstance(stage, ClusterTraining) else None
    return chosen or list(range(cluster_count(pipeline, stage.clustering)))


def model_of(pipeline: Pipeline, name: str) -> ModelConfig:
    """The shape of the models that a stage trains or hands out."""
    kind, stage = _model_stage(pipeline, name)
    return kind.shape(pipeline, stage)


def experts_of(pipeline: Pipeline, name: str) -> str | None:
    """What a stage with many experts makes, in words; None where it makes ordinary models."""
    if name in (trainings := train_stages(pipeline)) and trainings[name].data == "cluster":
        return "a mixture of experts"
    model = model_of(pipeline, name)
    if model.window_experts is None:
        return None
    return "a projected network" if model.projection is not None else "an MoE that routes by cluster"


def starts_from_mixture(pipeline: Pipeline, stage: TrainStage) -> bool:
    """Whether a training makes an MoE of all models of a mixture."""
    if stage.upcycle is None or stage.init is None:
        return False
    start = pipeline.stages[stage.init]
    return isinstance(start, TrainStage) and start.data == "cluster"


def first_models(pipeline: Pipeline, stage: TrainStage, key: str) -> list[TaskId]:
    """The tasks whose weights the training of the model `key` starts from: one, for an MoE that is made of a mixture all of its
    models, or none."""
    if stage.init is None:
        return []
    keys = model_keys(pipeline, stage.init) if starts_from_mixture(pipeline, stage) else [key]
    return [TaskId(stage.init, key_for(pipeline, stage.init, one)) for one in keys]


def has_online_teacher(stage: TrainStage) -> bool:
    """Whether a teacher computes beside the student."""
    return stage.distill is not None and stage.distill.cache is None and stage.distill.alpha > 0


def validates_by_cluster(stage: TrainStage) -> bool:
    """Whether early stopping weights the held-out generic windows by their clusters. A training that reads the domain's text is
    validated on that instead."""
    return stage.early_stopping is not None and stage.clustering is not None and not stage.mixes_in_domain


def held_out_assignments(pipeline: Pipeline) -> set[str]:
    """The assign stages by whose clusters a training is validated."""
    return {stage.clustering or "" for stage in train_stages(pipeline).values() if validates_by_cluster(stage)}


def setup_of(pipeline: Pipeline, name: str) -> Setup:
    """What a train stage requires of its engine."""
    stage = train_stage(pipeline, name)
    tokens = tokenize_stage(pipeline, stage.tokens)
    setup = Setup(
        model_of(pipeline, name),
        stage.parallel,
        stage.precision,
        vocabulary_size(pipeline, stage.tokens),
        tokens.context_length,
        stage.global_batch_size,
        stage.micro_batch_size,
        stage.fp8,
        stage.network.windows_per_expert if stage.network else 1,
        _variants(stage),
        model_of(pipeline, stage.distill.teacher).base_config if stage.distill and has_online_teacher(stage) else None,
    )
    return replace(setup, packing=stage.packing or best_packing(setup))


def trial_setup_of(pipeline: Pipeline, stage: SelectStage) -> Setup:
    """What the trials of a select stage require of their engine: an expert as an ordinary model, on one process."""
    assert stage.trial is not None
    setup = Setup(
        model_of(pipeline, stage.experts).base_config,
        ParallelConfig(),
        stage.trial.precision,
        vocabulary_size(pipeline, stage.tokens),
        tokenize_stage(pipeline, stage.tokens).context_length,
        stage.trial.global_batch_size,
        stage.trial.micro_batch_size,
    )
    return replace(setup, packing=stage.trial.packing or best_packing(setup))


def _variants(stage: TrainStage) -> int:
    """The number of mixtures of experts in a step: one per group of windows; without soups, one per cluster at most."""
    if (network := stage.network) is None or network.projection is None:
        return 0
    groups = stage.global_batch_size // network.windows_per_expert
    return groups if network.soup else min(groups, network.experts)


def distinct_setups(pipeline: Pipeline, name: str | None) -> dict[str, Setup]:
    """The named train stage and its setup, or for each different setup of the config one stage that has it.

    Raises:
        ConfigError: there is no train stage of that name.
    """
    names = list(train_stages(pipeline))
    if name is not None and name not in names:
        raise ConfigError(f"--stage {name}: no train stage of that name; there are {', '.join(names)}")
    setups: dict[str, Setup] = {}
    for other in names if name is None else [name]:
        setup = setup_of(pipeline, other)
        if setup not in setups.values():
            setups[other] = setup
    return setups


def method_of(pipeline: Pipeline, name: str) -> str:
    """The name of a stage's method in tables: given, or that of the stage it starts from, or the stage's own name."""
    kind, stage = _model_stage(pipeline, name)
    before = kind.start(stage)
    return stage.method or (method_of(pipeline, before) if before else name)


def imported_models(pipeline: Pipeline, name: str) -> list[str]:
    """The import stages whose models a stage's models start from or learn from: what trained those is in no cost here."""
    stage = pipeline.stages[name]
    if isinstance(stage, ImportStage):
        return [name]
    kind = kind_of(stage)
    read = [other for field, other in kind.named_stages(stage) if kind.references[field] in ("model", "distributions")]
    return list(dict.fromkeys(found for other in read for found in imported_models(pipeline, other)))


def domain_text(pipeline: Pipeline, name: str) -> DomainText:
    """How a stage's models have read the domain's own text: not at all, mixed into a pretraining (`domain_fraction`), or in a
    fine-tuning."""
    kind, stage = _model_stage(pipeline, name)
    before = kind.start(stage)
    return max(
        domain_text(pipeline, before) if before else "none", kind.domain_text(stage), key=get_args(DomainText).index
    )


def is_finetuned(pipeline: Pipeline, name: str) -> bool:
    """Whether a stage's models have been trained on the domain's own text, alone or mixed in."""
    return domain_text(pipeline, name) != "none"


def finetuned_models(pipeline: Pipeline) -> dict[str, str]:
    """For each method the last stage of the config that fine-tunes its models."""
    return {method_of(pipeline, name): name for name in train_stages(pipeline) if is_finetuned(pipeline, name)}


def trainings(pipeline: Pipeline, name: str) -> list[tuple[str, str]]:
    """The stages that a model went through, oldest first, each with the data it was trained on (behind a plus what was
    mixed in) or with the criterion of its selection."""
    kind, stage = _model_stage(pipeline, name)
    before = kind.start(stage)
    return [*(trainings(pipeline, before) if before else []), (name, kind.origin(stage))]
