"""What stages that name each other must have in common: tokenizers, experts, teachers. All of it is known before
anything runs."""

from collections.abc import Iterator

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.schema import (
    EmbedStage,
    EvaluateStage,
    ExportStage,
    Pipeline,
    SelectStage,
    TeachStage,
    TokenizerStage,
)
from megatron_specialm.config.training import TrainStage
from megatron_specialm.graph.lineage import (
    assign_stage,
    cluster_count,
    key_for,
    model_keys,
    model_of,
    tokenize_stage,
    trained_clusters,
)


def check_relations(pipeline: Pipeline, name: str) -> None:
    """Check a stage against those it names.

    Raises:
        ConfigError: naming the key, both values and the fix.
    """
    stage = pipeline.stages[name]
    for field, model in _models(pipeline, name):
        _check_tokenizer(pipeline, name, model)
        if field != "experts":
            _check_single(pipeline, name, field, model)
        if isinstance(stage, TrainStage | TeachStage):
            _check_keys(pipeline, name, field, model)
    if isinstance(stage, TrainStage):
        _check_clusters(pipeline, name, stage)
        _check_cache(pipeline, name, stage)
    if isinstance(stage, SelectStage):
        _check_experts(pipeline, name, stage)
    if isinstance(stage, TeachStage):
        _check_count(pipeline, name, stage)


def _models(pipeline: Pipeline, name: str) -> Iterator[tuple[str, str]]:
    """The (field, stage) pairs by which a stage takes the weights of others."""
    stage = pipeline.stages[name]
    if isinstance(stage, EvaluateStage | ExportStage):
        yield from (("models", model) for model in stage.models)
    elif isinstance(stage, SelectStage):
        yield "experts", stage.experts
    elif isinstance(stage, TeachStage):
        yield "teacher", stage.teacher
    elif isinstance(stage, TrainStage):
        if stage.init is not None:
            yield "init", stage.init
        if stage.distill is not None:
            yield "distill.teacher", stage.distill.teacher


def _check_tokenizer(pipeline: Pipeline, name: str, model: str) -> None:
    """Weights mean nothing under another tokenizer, even where its size is the same."""
    own, theirs = (tokenize_stage(pipeline, _tokens(pipeline, user)).tokenizer for user in (name, model))
    if own != theirs:
        raise ConfigError(
            f"stages.{name}.tokens: they are of tokenizer `{own}`, and the weights of `{model}` of tokenizer "
            f"`{theirs}`: name tokens that `{theirs}` has made"
        )


def _tokens(pipeline: Pipeline, name: str) -> str:
    stage = pipeline.stages[name]
    assert isinstance(stage, TrainStage | SelectStage | TeachStage | EvaluateStage | ExportStage)
    return stage.tokens


def _check_single(pipeline: Pipeline, name: str, field: str, model: str) -> None:
    if (experts := _experts(pipeline, model)) is not None:
        raise ConfigError(
            f"stages.{name}.{field}: {model!r} is {experts}, not one model: choose one with a stage "
            f"{{kind: select, experts: {model}, ...}}, and name that"
        )


def _check_keys(pipeline: Pipeline, name: str, field: str, model: str) -> None:
    """A training for everybody, or of a cluster's expert, can take nothing that is a domain's."""
    own = list(pipeline.text.domains) if isinstance(pipeline.stages[name], TeachStage) else model_keys(pipeline, name)
    if key := next((key for key in own if key_for(pipeline, model, key) not in model_keys(pipeline, model)), None):
        raise ConfigError(
            f"stages.{name}.{field}: {model!r} is made for each domain, and {name!r} is not ({name}/{key}): name a stage "
            "that serves all domains, or set `data: domain`"
        )


def _experts(pipeline: Pipeline, name: str) -> str | None:
    """What a stage with many experts is; None for ordinary models."""
    stage = pipeline.stages[name]
    if isinstance(stage, TrainStage) and stage.data == "cluster":
        return "a mixture of experts"
    return "a projected network" if model_of(pipeline, name).projection is not None else None


def _check_clusters(pipeline: Pipeline, name: str, stage: TrainStage) -> None:
    if stage.assignment is None:
        return
    assign = assign_stage(pipeline, stage.assignment)
    vectors = pipeline.stages[assign.vectors]
    assert isinstance(vectors, EmbedStage)
    if vectors.tokens != stage.tokens:
        raise ConfigError(
            f"stages.{name}.tokens: {stage.tokens}, and `{stage.assignment}` has the clusters of the windows of "
            f"`{vectors.tokens}`: set them equal, or name another assign stage"
        )
    k = cluster_count(pipeline, stage.assignment)
    if stage.projection is not None and stage.projection.experts != k:
        raise ConfigError(
            f"stages.{name}.projection.experts: {stage.projection.experts}, and `{stage.assignment}` has {k} clusters: "
            "an expert is a cluster's, so set them equal"
        )
    for cluster in trained_clusters(pipeline, name) if stage.data == "cluster" else ():
        if cluster >= k:
            raise ConfigError(
                f"stages.{name}.clusters: {cluster} does not exist: `{stage.assignment}` has clusters 0 to {k - 1}"
            )


def _check_cache(pipeline: Pipeline, name: str, stage: TrainStage) -> None:
    distill = stage.distill
    if distill is None or distill.cache is None:
        return
    cache = pipeline.stages[distill.cache]
    assert isinstance(cache, TeachStage)
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


def _check_experts(pipeline: Pipeline, name: str, stage: SelectStage) -> None:
    kind = _experts(pipeline, stage.experts)
    if kind is None:
        raise ConfigError(
            f"stages.{name}.experts: {stage.experts!r} makes one model: name a train stage with `data: cluster` or "
            "`projection`"
        )
    if stage.by == "histogram" and kind != "a projected network":
        raise ConfigError(
            f"stages.{name}.by: histogram mixes the codes of a projected network, and {stage.experts!r} is {kind}: "
            "choose another criterion"
        )


def _check_count(pipeline: Pipeline, name: str, stage: TeachStage) -> None:
    tokenizer = pipeline.stages[tokenize_stage(pipeline, stage.tokens).tokenizer]
    assert isinstance(tokenizer, TokenizerStage)
    if stage.keep == "top-k" and tokenizer.path is None and (stage.count or 0) > tokenizer.vocabulary_size:
        raise ConfigError(
            f"stages.{name}.count: {stage.count} of a vocabulary of {tokenizer.vocabulary_size}: at most as many, or "
            "`keep: exact`"
        )
