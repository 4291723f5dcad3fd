"""Perplexity of a model on held-out documents."""

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.config.graph import model_task, sources
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.schema import GENERIC, EvaluateStage
from megatron_specialm.data.batches import evaluation_batches
from megatron_specialm.data.store import TokenStore
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.stages.context import Context
from megatron_specialm.train.checkpoint import find_final, read_model
from megatron_specialm.train.distributed import process_group
from megatron_specialm.train.evaluation import score


def run(stage: EvaluateStage, context: Context) -> Report:
    """Score a shared model on the test documents of every set, a domain's model on its domain's.

    Every token of a window is predicted once, from what stands before it in the window. Writes `evaluation.json`:
    per set the mean negative log-likelihood in nats per token and the number of tokens.
    """
    model_id = model_task(context.pipeline, context.key)
    final = find_final(context.artifact(*model_id))
    state = read_json(final / "state.json")
    shape = ModelConfig.model_validate(state["model"])
    results: dict[str, dict[str, float]] = {}
    tokens = slots = 0
    with process_group(ALONE, threads=context.threads):  # the first rank's work, however many there are
        model = Gpt(shape, vocabulary_size=state["vocabulary_size"], context_length=state["context_length"])
        model.load(read_model(final))
        for source in sources(context.pipeline) if model_id.key == GENERIC else [model_id.key]:
            folder = context.artifact(stage.tokens, source)
            store = TokenStore.open(folder, "test", tokenizer=state["tokenizer"])
            batches = evaluation_batches(store, batch_size=stage.batch_size, max_windows=stage.max_windows)
            loss = score(model, batches)
            results[source] = {"nll": loss.mean, "tokens": loss.tokens}
            tokens += loss.tokens
            slots += min(len(store), stage.max_windows or len(store)) * store.context_length
    write_json(context.folder / "evaluation.json", results)
    return Report(
        tokens=tokens,
        flops=slots * shape.forward_flops(state["vocabulary_size"], state["context_length"]),
        values={"sets": results, "parameters": shape.parameters(state["vocabulary_size"])},
    )
