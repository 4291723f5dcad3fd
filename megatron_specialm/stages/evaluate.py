"""Perplexity of a model on held-out documents."""

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.files import write_json
from megatron_specialm.config.graph import model_task
from megatron_specialm.config.lineage import sources
from megatron_specialm.config.schema import EvaluateStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.data.batches import count_windows, evaluation_batches
from megatron_specialm.data.store import TokenStore
from megatron_specialm.stages.context import Context
from megatron_specialm.train.checkpoint import find_final
from megatron_specialm.train.distributed import process_group
from megatron_specialm.train.evaluation import score
from megatron_specialm.train.served import read_served


def run(stage: EvaluateStage, context: Context) -> Report:
    """Score a shared model on the test documents of every set, a domain's model on its domain's.

    Every token of a window is predicted once, from what stands before it in the window. Writes `evaluation.json`:
    per set the mean negative log-likelihood in nats per token and the number of tokens.
    """
    model_id = model_task(context.pipeline, context.key)
    final = find_final(context.artifact(*model_id))
    served = read_served(final)
    results: dict[str, dict[str, float]] = {}
    tokens = slots = 0
    with process_group(ALONE, threads=context.threads):  # the first rank's work, however many there are
        model = served.build()
        for source in sources(context.pipeline) if model_id.key == GENERIC else [model_id.key]:
            folder = context.artifact(stage.tokens, source)
            store = TokenStore.open(folder, "test", tokenizer=served.state["tokenizer"])
            batches = evaluation_batches(store, batch_size=stage.batch_size, max_windows=stage.max_windows)
            windows = min(len(store), stage.max_windows or len(store))
            loss = score(model, context.counted(batches, unit="windows", of=windows, size=count_windows))
            results[source] = {"nll": loss.mean, "tokens": loss.tokens}
            tokens += loss.tokens
            slots += windows * store.context_length
    write_json(context.folder / "evaluation.json", results)
    return Report(
        tokens=tokens,
        slots=slots,
        flops=slots * served.shape.forward_flops(served.vocabulary_size, served.context_length),
        values={"sets": results, "parameters": served.shape.parameters(served.vocabulary_size)},
    )
