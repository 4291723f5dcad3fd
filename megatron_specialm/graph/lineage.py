"""What a stage's models are: for whom, of which shape and method, and from which weights. Answers follow from the config,
through `init`, `experts` and `teacher`; the graph (`graph/tasks.py`) has checked that these name what they must."""

from typing import Literal

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.schema import (
    AssignStage,
    ClusterStage,
    Pipeline,
    SelectStage,
    TokenizerStage,
    TokenizeStage,
)
from megatron_specialm.config.text import GENERIC, TextSet
from megatron_specialm.config.training import TrainStage
from megatron_specialm.estimate.setup import Setup

# Keys of tasks of their own, which no domain can have as a name: the one that makes an embed stage's encoder, and those that
# embed and assign the generic set's held-out windows, where a training is validated by their clusters.
ENCODER = f"{GENERIC}.encoder"
HELD_OUT = f"{GENERIC}.validation"


def sources(pipeline: Pipeline) -> list[str]:
    """The keys of the sets of text: `generic`, then the domains."""
    return [GENERIC, *pipeline.text.domains]


def text_set(pipeline: Pipeline, source: str) -> TextSet:
    """The files of one set."""
    return pipeline.text.generic if source == GENERIC else pipeline.text.domains[source]


def shard_keys(pipeline: Pipeline, source: str) -> list[str]:
    """The keys of a set's shards, `generic.00000`, ...; none where the set is prepared as a whole."""
    shards = text_set(pipeline, source).shards
    return [f"{source}.{number:05d}" for number in range(shards)] if shards > 1 else []


def source_of(key: str) -> str:
    """The set that the key of a task over text is about, `generic` of `generic.00003`; or the model that the key of a train
    task is about, `legal` of `legal.rate-0.0017`. No domain's name has a dot."""
    return key.partition(".")[0]


def domain_of(pipeline: Pipeline, key: str) -> str | None:
    """The domain that a task's key stands for; None for `generic` and for a cluster: their cost is for everybody."""
    return key if key in pipeline.text.domains else None


def train_stage(pipeline: Pipeline, name: str) -> TrainStage:
    """The train stage of that name."""
    stage = pipeline.stages[name]
    assert isinstance(stage, TrainStage)
    return stage


def tokenize_stage(pipeline: Pipeline, name: str) -> TokenizeStage:
    """The tokenize stage of that name."""
    stage = pipeline.stages[name]
    assert isinstance(stage, TokenizeStage)
    return stage


def assign_stage(pipeline: Pipeline, name: str) -> AssignStage:
    """The assign stage of that name."""
    stage = pipeline.stages[name]
    assert isinstance(stage, AssignStage)
    return stage


def cluster_count(pipeline: Pipeline, assignment: str) -> int:
    """K of an assign stage."""
    clusters = pipeline.stages[assign_stage(pipeline, assignment).clusters]
    assert isinstance(clusters, ClusterStage)
    return clusters.k


def expert_key(cluster: int) -> str:
    """The key of the expert of a cluster."""
    return f"c{cluster}"


def cluster_of(key: str) -> int:
    """The cluster whose expert a key names."""
    return int(key.removeprefix("c"))


def model_keys(pipeline: Pipeline, name: str) -> list[str]:
    """The keys of a stage that makes models: one for everybody, one per cluster, or one per domain (also when it starts
    from a domain's weights)."""
    stage = pipeline.stages[name]
    if isinstance(stage, SelectStage):
        return list(pipeline.text.domains)
    assert isinstance(stage, TrainStage)
    if stage.data == "cluster":
        return [expert_key(cluster) for cluster in trained_clusters(pipeline, name)]
    per_domain = stage.data != "generic" or stage.domain_fraction > 0
    if stage.init is not None and model_keys(pipeline, stage.init) != [GENERIC]:
        per_domain = True
    return list(pipeline.text.domains) if per_domain else [GENERIC]


def key_for(pipeline: Pipeline, name: str, key: str) -> str:
    """Which of a stage's models serves a key: its own, or the one for everybody."""
    return key if key in model_keys(pipeline, name) else GENERIC


def trained_clusters(pipeline: Pipeline, name: str) -> list[int]:
    """The clusters that a mixture or a projected network has experts of."""
    stage = train_stage(pipeline, name)
    assert stage.assignment is not None
    return stage.clusters or list(range(cluster_count(pipeline, stage.assignment)))


def model_of(pipeline: Pipeline, name: str) -> ModelConfig:
    """The model that a stage trains or hands out. What is started from is served first: one expert, adapters merged."""
    stage = pipeline.stages[name]
    if isinstance(stage, SelectStage):
        return model_of(pipeline, stage.experts).plain
    assert isinstance(stage, TrainStage)
    if stage.model is not None:
        return stage.model.model_copy(update={"projection": stage.projection})
    assert stage.init is not None
    return model_of(pipeline, stage.init).plain.model_copy(update={"lora": stage.lora})


def has_online_teacher(stage: TrainStage) -> bool:
    """Whether a teacher computes beside the student."""
    return stage.distill is not None and stage.distill.cache is None and stage.distill.alpha > 0


def validates_by_cluster(stage: TrainStage) -> bool:
    """Whether early stopping asks which clusters the held-out generic windows are in. What reads the domain's text is
    validated on the domain's."""
    return stage.early_stopping is not None and stage.assignment is not None and not stage.domain_fraction


def setup_of(pipeline: Pipeline, name: str) -> Setup:
    """What a train stage asks of its engine."""
    stage = train_stage(pipeline, name)
    tokens = tokenize_stage(pipeline, stage.tokens)
    tokenizer = pipeline.stages[tokens.tokenizer]
    assert isinstance(tokenizer, TokenizerStage)
    return Setup(
        model_of(pipeline, name),
        stage.parallel,
        stage.precision,
        tokenizer.vocabulary_size,
        tokens.context_length,
        stage.global_batch_size,
        stage.micro_batch_size,
        stage.fp8,
        stage.windows_per_expert or 1,
        _variants(stage),
        model_of(pipeline, stage.distill.teacher).plain if stage.distill and has_online_teacher(stage) else None,
    )


def _variants(stage: TrainStage) -> int:
    """Mixtures of experts that a step computes with: one per group; without soups, groups of one cluster share theirs."""
    if stage.projection is None:
        return 0
    groups = stage.global_batch_size // (stage.windows_per_expert or 1)
    return groups if stage.soup else min(groups, stage.projection.experts)


def distinct_setups(pipeline: Pipeline, name: str | None) -> dict[str, Setup]:
    """The named train stage and its setup, or one stage for each setup that the config has.

    Raises:
        ConfigError: there is no train stage of that name.
    """
    names = [other for other, stage in pipeline.stages.items() if isinstance(stage, TrainStage)]
    if name is not None and name not in names:
        raise ConfigError(f"--stage {name}: no train stage of that name; there are {', '.join(names)}")
    setups: dict[str, Setup] = {}
    for other in names if name is None else [name]:
        setup = setup_of(pipeline, other)
        if setup not in setups.values():
            setups[other] = setup
    return setups


def method_of(pipeline: Pipeline, name: str) -> str:
    """The method's name in tables: given, or inherited from the stage it starts from, or the stage's own name."""
    stage = pipeline.stages[name]
    assert isinstance(stage, TrainStage | SelectStage)
    before = stage.experts if isinstance(stage, SelectStage) else stage.init
    return stage.method or (method_of(pipeline, before) if before else name)


def domain_text(pipeline: Pipeline, name: str) -> Literal["none", "mixed in", "fine-tuned"]:
    """How a model has read the domain's own text: not at all, mixed into the text of a pretraining (`domain_fraction`), or
    as what it was trained on."""
    stage = pipeline.stages[name]
    if isinstance(stage, SelectStage):
        return domain_text(pipeline, stage.experts)
    assert isinstance(stage, TrainStage)
    if stage.data == "domain":
        return "fine-tuned"
    before = domain_text(pipeline, stage.init) if stage.init is not None else "none"
    return "mixed in" if stage.domain_fraction and before == "none" else before


def is_finetuned(pipeline: Pipeline, name: str) -> bool:
    """Whether a model has been trained on the domain's own text, alone or mixed in."""
    return domain_text(pipeline, name) != "none"


def finetuned_models(pipeline: Pipeline) -> dict[str, str]:
    """For each method the last stage of the config that fine-tunes a model of it."""
    stages = [name for name, stage in pipeline.stages.items() if isinstance(stage, TrainStage)]
    return {method_of(pipeline, name): name for name in stages if is_finetuned(pipeline, name)}


def trainings(pipeline: Pipeline, name: str) -> list[tuple[str, str]]:
    """The stages that make a model, oldest first, each with how it was selected or the data it was trained on; behind a
    plus what was mixed in."""
    stage = pipeline.stages[name]
    if isinstance(stage, SelectStage):
        return [*trainings(pipeline, stage.experts), (name, stage.by)]
    assert isinstance(stage, TrainStage)
    mixed = f"+{GENERIC}" if stage.replay_fraction else "+domain" if stage.domain_fraction else ""
    return [*(trainings(pipeline, stage.init) if stage.init else []), (name, f"{stage.data}{mixed}")]
