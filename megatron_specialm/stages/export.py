"""A model as a Hugging Face folder, checked against the model it came from before it counts."""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from megatron_specialm.base.artifacts import Report
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import publish_folder, read_json, write_text
from megatron_specialm.config.graph import is_finetuned, method_of, model_task, text_set
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.schema import GENERIC, ExportStage, TokenizeStage
from megatron_specialm.convert.huggingface import huggingface_config, to_huggingface
from megatron_specialm.convert.model_card import ModelFacts, model_card
from megatron_specialm.convert.verify import largest_logit_difference
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.model import gpt
from megatron_specialm.stages.context import Context
from megatron_specialm.train.checkpoint import find_final, read_model
from megatron_specialm.train.distributed import process_group

WINDOWS_COMPARED = 4


def run(stage: ExportStage, context: Context) -> Report:
    """Write `model/` in the task's folder: config, weights, tokenizer, generation config, model card, manifest.

    It is written aside and takes its name only when Transformers, loading it, gives our logits on held-out windows and
    our token ids on their text.

    Raises:
        ArtifactError: they differ by more than the stage's tolerance.
    """
    model_id = model_task(context.pipeline, context.key)
    final = find_final(context.artifact(*model_id))
    state, weights = read_json(final / "state.json"), read_model(final)
    shape = ModelConfig.model_validate(state["model"])
    tokenize = context.pipeline.stages[stage.tokens]
    assert isinstance(tokenize, TokenizeStage)
    tokenizer = Tokenizer.load(context.artifact(tokenize.tokenizer, GENERIC))
    store = TokenStore.open(context.artifact(stage.tokens, model_id.key), "test", tokenizer=state["tokenizer"])

    aside = context.folder / ".model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file(to_huggingface(weights, shape), aside / "model.safetensors", metadata={"format": "pt"})
    config = huggingface_config(
        shape, vocabulary_size=store.vocabulary_size, context_length=store.context_length, eod=store.eod
    )
    config.architectures = ["LlamaForCausalLM" if shape.family == "llama" else "GPTNeoXForCausalLM"]
    config.save_pretrained(aside)
    GenerationConfig(bos_token_id=store.eod, eos_token_id=store.eod, pad_token_id=store.eod).save_pretrained(aside)
    tokenizer.save_huggingface(aside)

    difference = _compare(context, aside, shape, weights, store)
    if difference > stage.tolerance:
        raise ArtifactError(
            f"{aside}: Transformers' logits differ from ours by up to {difference:.2e}, more than the tolerance "
            f"{stage.tolerance:.0e}: the conversion of family {shape.family!r} is wrong for this version of transformers"
        )
    _check_tokenizer(aside, tokenizer, store)
    write_text(aside / "README.md", model_card(_facts(context, shape, store, difference)))
    publish_folder(aside, context.folder / "model")
    return Report(values={"logit_difference": difference, "parameters": shape.parameters(store.vocabulary_size)})


@torch.no_grad()
def _compare(
    context: Context, folder: Path, shape: ModelConfig, weights: dict[str, torch.Tensor], store: TokenStore
) -> float:
    batch = store.batch(np.arange(min(WINDOWS_COMPARED, len(store))))
    with process_group(context.world, threads=context.threads):
        model = gpt.build_model(
            shape, vocabulary_size=store.vocabulary_size, context_length=store.context_length
        ).eval()
        gpt.load_weights(model, weights, vocabulary_size=store.vocabulary_size)
        tokens = torch.from_numpy(batch.tokens).to(next(model.parameters()).device)
        ours = gpt.logits(model, tokens, vocabulary_size=store.vocabulary_size)
        return largest_logit_difference(folder, batch.tokens, ours)


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, store: TokenStore) -> None:
    text = "".join(tokenizer.decode(store.window(index)) for index in range(min(WINDOWS_COMPARED, len(store))))
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, add_special_tokens=False).input_ids
    if theirs != tokenizer.encode([text])[0].tolist():
        raise ArtifactError(
            f"{folder}: AutoTokenizer gives other token ids than the tokenizer the model was trained with"
        )


def _facts(context: Context, shape: ModelConfig, store: TokenStore, difference: float) -> ModelFacts:
    pipeline = context.pipeline
    model_id = model_task(pipeline, context.key)
    marker = context.marker(*model_id)
    return ModelFacts(
        name=f"{pipeline.name}: {model_id.stage}, {model_id.key}",
        method=method_of(pipeline, model_id.stage),
        domain=model_id.key,
        finetuned=is_finetuned(pipeline, model_id.stage),
        parameters=shape.parameters(store.vocabulary_size),
        context_length=store.context_length,
        vocabulary_size=store.vocabulary_size,
        domain_files=() if model_id.key == GENERIC else tuple(text_set(pipeline, model_id.key).train),
        generic_files=tuple(pipeline.text.generic.train),
        training_tokens=marker.cost.tokens,
        training_flops=marker.cost.flops,
        device_seconds=marker.cost.device_seconds,
        device=marker.cost.device,
        steps=marker.values["steps"],
        validation_loss=marker.values["validation_loss"],
        logit_difference=difference,
        seed=pipeline.seed,
        digest=marker.digest,
    )
