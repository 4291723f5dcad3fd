"""What a stage and those whose models it reads must have in common. It is known before anything runs."""

from collections.abc import Sequence

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.lineage import experts_of, key_for, model_keys, tokenizer_task
from megatron_specialm.graph.stage_kind import kind_of


def check_tokenizer(pipeline: Pipeline, name: str, tokens: str, model: str) -> None:
    """Weights mean nothing under another tokenizer, even where its size is the same.

    Args:
        tokens: the tokenize stage that the stage `name` reads.
        model: the stage whose models it reads.

    Raises:
        ConfigError: naming both tokenizers and the fix.
    """
    stage = pipeline.stages[model]
    (its_tokens,) = (other for field, other in kind_of(stage).named_stages(stage) if field == "tokens")
    own, theirs = (tokenizer_task(pipeline, read).stage for read in (tokens, its_tokens))
    if own != theirs:
        raise ConfigError(
            f"stages.{name}.tokens: they are of tokenizer `{own}`, and the weights of `{model}` of tokenizer "
            f"`{theirs}`: name tokens that `{theirs}` has made"
        )


def check_model(
    pipeline: Pipeline, name: str, field: str, tokens: str, model: str, *, keys: Sequence[str] | None = None
) -> None:
    """Check that a stage can read the models of another, each of which is one model.

    Args:
        field: the field of the stage `name` that names `model`.
        tokens: the tokenize stage that it reads.
        keys: the keys of its tasks, each of which reads the model of its key or the one for all domains; None where its tasks
            follow from the models.

    Raises:
        ConfigError: naming the key, both values and the fix.
    """
    check_tokenizer(pipeline, name, tokens, model)
    if (experts := experts_of(pipeline, model)) is not None:
        raise ConfigError(
            f"stages.{name}.{field}: {model!r} is {experts}, not one model: choose one with a stage "
            f"{{kind: select, experts: {model}, ...}}, and name that"
        )
    # A training for all domains, or of a cluster's expert, can read no model of one domain.
    if key := next(
        (key for key in keys or () if key_for(pipeline, model, key) not in model_keys(pipeline, model)), None
    ):
        raise ConfigError(
            f"stages.{name}.{field}: {model!r} is made for each domain, and {name!r} is not ({name}/{key}): name a stage "
            "that serves all domains, or set `data: domain`"
        )
