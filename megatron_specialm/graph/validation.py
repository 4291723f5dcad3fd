"""Which stages validate on which sets of text, and whether enough of each set is held out for it."""

from collections.abc import Mapping

from megatron_specialm.base.errors import DataError
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import text_set
from megatron_specialm.graph.stage_kind import kind_of


def validating_stages(pipeline: Pipeline, tokens: str, source: str) -> list[str]:
    """The stages that validate on the held-out text of a set, tokenized by the stage `tokens`: trainings with early
    stopping, and selections that fine-tune experts."""
    return [
        name
        for name, stage in pipeline.stages.items()
        if ("tokens", tokens) in kind_of(stage).named_stages(stage)
        and source in kind_of(stage).validated_sets(pipeline, name, stage)
    ]


def documents_needed(pipeline: Pipeline, tokens: str, source: str) -> int:
    """The least number of documents in the files that are validated on, or of which documents are held out for it; 0 where no
    stage validates on the set. Of a single document the end can be held out."""
    if not validating_stages(pipeline, tokens, source):
        return 0
    files = text_set(pipeline, source)
    needed = files.validation_floor.documents
    at_most_half = not files.validation and files.shards == 1 and needed > 1
    return 2 * needed if at_most_half else needed


def refuse_too_little(pipeline: Pipeline, tokens: str, source: str, counts: Mapping[str, Mapping[str, int]]) -> None:
    """Check the held-out text of a set against its `validation_floor`, where a stage of the config validates on it.

    Args:
        counts: `documents` and `tokens` by split, from the marker of the tokenize stage.

    Raises:
        DataError: naming the set, what there is, the floor and the fix.
    """
    files = text_set(pipeline, source)
    trained, held_out = ((counts["documents"][split], counts["tokens"][split]) for split in ("train", "validation"))
    if files.validation_floor.is_met(*held_out) or not validating_stages(pipeline, tokens, source):
        return
    beside = "" if files.validation else f" held out, beside {_amount(*trained)} to train on"
    raise too_little(pipeline, tokens, source, f"{_amount(*held_out)}{beside}")


def too_little(pipeline: Pipeline, tokens: str, source: str, has: str) -> DataError:
    """The error for a set with too little text to validate on; `has` says how much there is."""
    files, stages = text_set(pipeline, source), validating_stages(pipeline, tokens, source)
    floor, where = files.validation_floor, f"text.{source}" if source == GENERIC else f"text.domains.{source}"
    least = f"at least {floor.documents:,} documents and {floor.tokens:,} tokens"
    wanted = f"to validate on them ({', '.join(stages)}) takes {least} (`validation_floor`)"
    # All sizes of a domain have one floor.
    lower = f"lower text.{'' if source == GENERIC else 'domains.'}{files.domain or source}.validation_floor"
    if files.validation:
        return DataError(
            f"{where}.validation: {', '.join(files.validation)}: {has}; {wanted}: add documents, leave `validation` out to "
            f"hold some of the training documents out, or {lower}"
        )
    shards = ", set fewer `shards`" if files.shards > 1 else ""
    return DataError(
        f"{where}: {has}; {wanted}, and at most half of a set is held out: add documents, name `validation` files{shards}, "
        f"or {lower}"
    )


def _amount(documents: int, tokens: int) -> str:
    return f"{documents:,} document{'s' if documents != 1 else ''} of {tokens:,} tokens"
