"""Export a model as a Hugging Face folder, and publish it only if Transformers computes the same logits from it."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from megatron_specialm.base.artifacts import Cost, Marker, Report
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import publish_folder, write_text
from megatron_specialm.checkpoint.merged import read_merged
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.schema import ExportStage
from megatron_specialm.config.text import GENERIC
from megatron_specialm.convert import canonical_folder
from megatron_specialm.convert.huggingface import largest_logit_difference
from megatron_specialm.convert.huggingface_folder import FORMAT
from megatron_specialm.convert.llama_cpp import advice
from megatron_specialm.convert.model_card import READS, ModelFacts, model_card
from megatron_specialm.convert.run import write_target
from megatron_specialm.convert.tokenizer import disagreement
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.flops import forward_flops
from megatron_specialm.estimate.parameters import count_parameters
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.lineage import is_finetuned, method_of, text_set, tokenizer_task, trainings
from megatron_specialm.graph.tasks import model_task
from megatron_specialm.model.gpt import Gpt

WINDOWS_COMPARED = 4


def run(stage: ExportStage, context: Context) -> Report:
    """Write `model/` in the task's folder: config, weights, fingerprint, tokenizer, generation config, model card, manifest.

    It is written to a temporary folder. Transformers loads that folder; it must give our logits on held-out windows, our token
    ids on their text, and batches of the model's length. Then the folder is renamed; otherwise it is removed.

    Raises:
        ArtifactError: they differ by more than the stage's tolerance.
    """
    model_id = model_task(context.key)
    final = find_final(context.artifact(*model_id))
    merged = read_merged(final)
    shape, state = merged.shape, merged.state
    tokenizer = Tokenizer.load(context.artifact(*tokenizer_task(context.pipeline, stage.tokens)))
    tokens = context.artifact(stage.tokens, model_id.key)
    store = TokenStore.open(tokens, "test", tokenizer=state["tokenizer"])

    aside = context.folder / ".model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    temporary = aside / "model"  # what a killed writer leaves is inside, too
    try:
        dtype = torch.float32 if stage.dtype == "fp32" else torch.bfloat16
        _write(temporary, final, store, tokenizer, dtype=dtype, threads=context.threads)
        weights = {name: tensor.to(dtype) for name, tensor in merged.weights.items()}  # as they are in the folder
        difference = _logit_difference(temporary, shape, weights, store, threads=context.threads)
        if not difference <= stage.tolerance:  # `not <=` also rejects NaN
            raise ArtifactError(
                f"{context.folder}: not exported: Transformers' logits differ from ours by up to {difference:.2e}, "
                f"more than the tolerance {stage.tolerance:.0e}: transformers {transformers.__version__} computes "
                f"family {shape.family!r} otherwise than we expect, or the weights of {final} are not finite"
            )
        _check_tokenizer(temporary, tokenizer, store)
        write_text(temporary / "README.md", model_card(_facts(context, shape, tokens, tokenizer, difference)))
        publish_folder(temporary, context.folder / "model")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    compared = min(WINDOWS_COMPARED, len(store)) * store.context_length
    return Report(
        slots=compared,
        # One forward pass of our model and one of Transformers'.
        flops=2 * compared * forward_flops(shape, store.vocabulary_size, store.context_length),
        values={
            "logit_difference": difference,
            "parameters": count_parameters(shape, store.vocabulary_size),
        },
    )


def _write(
    folder: Path, step: Path, store: TokenStore, tokenizer: Tokenizer, *, dtype: torch.dtype, threads: int
) -> None:
    """Write all files that Transformers reads, as `specialm convert` does, with its proof."""
    source = canonical_folder.open_folder(step)
    ids = {"bos_token_id": store.bos, "eos_token_id": store.eod, "pad_token_id": tokenizer.pad}
    model = replace(source.model, context_length=store.context_length, special_ids=ids)
    source = replace(source, model=model, tokenizer=tokenizer.folder)
    write_target(source, folder, to=FORMAT, dtype=dtype, weights_only=True, threads=threads)


@torch.no_grad()
def _logit_difference(
    folder: Path, shape: ModelConfig, weights: Mapping[str, torch.Tensor], store: TokenStore, *, threads: int
) -> float:
    batch = store.batch(np.arange(min(WINDOWS_COMPARED, len(store))))
    # Only rank 0 exports: it must not wait for other ranks.
    with single_process(threads=threads):
        model = Gpt(shape, vocabulary_size=store.vocabulary_size, context_length=store.context_length).train(False)
        model.load(weights)
        ours = model.logits(torch.from_numpy(batch.tokens).to(model.device))
        return largest_logit_difference(folder, batch.tokens, ours)


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, store: TokenStore) -> None:
    text = "".join(tokenizer.decode(store.window(index)) for index in range(min(WINDOWS_COMPARED, len(store))))
    found = disagreement(folder, tokenizer, context_length=store.context_length, texts=[text])
    if found is not None:
        raise ArtifactError(
            f"{folder.parent}: not exported: AutoTokenizer of transformers {transformers.__version__} {found}; the tokenizer "
            "stage found no such thing: use the version of transformers that it ran with"
        )


def _facts(context: Context, shape: ModelConfig, tokens: Path, tokenizer: Tokenizer, difference: float) -> ModelFacts:
    pipeline, model_id = context.pipeline, model_task(context.key)
    marker = context.marker(*model_id)
    steps = tuple(trainings(pipeline, model_id.stage))
    reads_generic = any(data in READS and data != "domain" for _, data in steps)
    store = TokenStore.open(tokens, "train")
    return ModelFacts(
        name=f"{pipeline.name}: {model_id.stage}, {model_id.key}",
        method=method_of(pipeline, model_id.stage),
        domain=model_id.key,
        finetuned=is_finetuned(pipeline, model_id.stage),
        family=shape.family,
        activation=shape.activation_name,
        parameters=count_parameters(shape, store.vocabulary_size),
        active_parameters=count_parameters(shape, store.vocabulary_size, active=True),
        context_length=store.context_length,
        vocabulary_size=store.vocabulary_size,
        tokenizer=tokenizer.fingerprint,
        trainings=steps,
        domain_files=() if model_id.key == GENERIC else tuple(text_set(pipeline, model_id.key).train),
        generic_files=tuple(pipeline.text.generic.train) if reads_generic else (),
        set_tokens=store.tokens,
        phase=GENERIC if model_id.key == GENERIC else "specialization",
        steps=marker.values["steps"],
        cost=_cost(marker),
        learning_rate=marker.values.get("learning_rate"),
        learning_rates=tuple(marker.values.get("learning_rates", ())),
        validation_loss=marker.values["validation_loss"],
        logit_difference=difference,
        llama_cpp=advice(shape, tokenizer),
        seed=pipeline.seed,
        training_seed=pipeline.seed_of_training,
        digest=marker.digest,
    )


def _cost(marker: Marker) -> Cost:
    """The cost of a training, including the earlier training that it continues and the trials of its learning rates."""
    own, trials = marker.whole_cost, marker.values.get("trials", {})
    return replace(own, **{what: getattr(own, what) + cost for what, cost in trials.items()})
