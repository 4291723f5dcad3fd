"""Perplexity of a model on held-out documents."""

from typing import Any

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.files import write_json
from megatron_specialm.checkpoint.merged import read_merged
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.config.schema import EvaluateStage
from megatron_specialm.data.batches import count_windows, evaluation_batches
from megatron_specialm.data.store import TokenStore
from megatron_specialm.engine.open import single_process
from megatron_specialm.engine.protocol import LossSum
from megatron_specialm.estimate.flops import reading_flops
from megatron_specialm.estimate.parameters import count_parameters
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.tasks import evaluated_set, model_task
from megatron_specialm.train.evaluation import score


def run(stage: EvaluateStage, context: Context) -> Report:
    """Score a model on the test documents of one set. A domain's model is scored on its domain, a generic one on every set.

    Each token is predicted once, from the tokens before it in its window. Writes `evaluation.json`: the mean negative
    log-likelihood in nats per token, and the number of tokens; their product, and the UTF-8 bytes of the text scored. If
    `max_windows` leaves windows out, these bytes are estimated: they are in proportion to the tokens.
    """
    source = evaluated_set(context.key)
    merged = read_merged(find_final(context.artifact(*model_task(context.key))))
    store = TokenStore.open(context.artifact(stage.tokens, source), "test", tokenizer=merged.state["tokenizer"])
    windows = min(len(store), stage.max_windows or len(store))
    batches = evaluation_batches(store, batch_size=stage.batch_size, max_windows=stage.max_windows)
    with single_process(threads=context.threads):  # runs on rank 0 only
        counted = context.counted(batches, unit="windows", of=windows, size=count_windows)
        loss = score(merged.build(), counted, packing=stage.packing)
    results = {source: {"nll": loss.mean, "tokens": loss.tokens, **text_scored(store, loss)}}
    write_json(context.folder / "evaluation.json", results)
    return Report(
        tokens=loss.tokens,
        slots=loss.slots,
        flops=reading_flops(
            merged.shape, merged.vocabulary_size, store.context_length, slots=loss.slots, saved=loss.saved
        ),
        values={
            "sets": results,
            "parameters": count_parameters(merged.shape, merged.vocabulary_size),
            "active_parameters": count_parameters(merged.shape, merged.vocabulary_size, active=True),
        },
    )


def text_scored(store: TokenStore, loss: LossSum) -> dict[str, Any]:
    """Total nats and bytes; nothing for a store of an earlier version, which does not record its bytes."""
    if store.text_bytes is None:
        return {}
    return {
        "nats": loss.total,
        "bytes": max(1, round(store.text_bytes * loss.tokens / store.tokens)),
        "bytes_estimated": loss.tokens < store.tokens,
    }
