"""DeepSpeed's checkpoints as canonical weights and back. They have the names of the module that was trained: of Transformers or
of Megatron-Core; and do not say which model it is."""

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.architectures import CONFIG, Model, read_config
from megatron_specialm.convert.adam import DEFAULTS, MOMENTS, read_adam
from megatron_specialm.convert.deepspeed_folder import ParameterGroup, open_deepspeed
from megatron_specialm.convert.deepspeed_writing import DeepSpeedState, write_universal, write_zero1
from megatron_specialm.convert.families import from_huggingface_lazily, rows, to_huggingface_lazily
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.huggingface_folder import parameter_names, without_copies, write_config
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.megatron_names import canonical_names, from_megatron
from megatron_specialm.convert.source import Source, TargetSpec
from megatron_specialm.convert.tokenizer_files import copy_tokenizer, find_tokenizer
from megatron_specialm.model.weights import WORD_EMBEDDINGS

FORMAT = "deepspeed"
_NEOX_OUTPUT = ("embed_out.", "lm_head.")  # GPT-NeoX's output layer in files, and in the module since Transformers 5
_WRAPPED = re.compile(r"(?<![\w.])module\.")


def open_folder(path: Path, given: Model | None) -> Source:
    """Open a checkpoint of ZeRO 1 to 3, or a universal one.

    Args:
        given: the model; without it, a config.json beside the checkpoint says it.

    Raises:
        CheckpointError: it is damaged or incomplete, nothing says which model it is of, or tensors do not fit that.
    """
    opened = open_deepspeed(path)
    beside = [folder for folder in (opened.folder, opened.folder.parent) if (folder / CONFIG).is_file()]
    if given is None and not beside:
        raise CheckpointError(
            f"{opened.folder}: DeepSpeed's checkpoints do not say which model they are of: name its config.json by --config"
        )
    model = given or read_config(beside[0] / CONFIG)
    dropped: dict[str, str] = {}

    def ours(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        if any(name.startswith("decoder.") for name in tensors):
            return from_megatron(canonical_names(tensors, opened.folder), model, where=opened.folder)
        used, copies = without_copies(opened.folder, tensors, model)
        dropped.update(copies)
        return from_huggingface_lazily(used, model.shape, vocabulary_size=model.vocabulary_size)

    stored, module, moments = (_plain(tensors) for tensors in (opened.tensors, opened.module, opened.optimizer))
    weights, optimizer = ours(stored), None
    if all(f"{kind}/{name}" in moments for kind in MOMENTS for name in stored if name not in dropped):
        groups = [group.settings for group in opened.groups]
        optimizer = read_adam(moments, step=opened.optimizer_step, groups=groups, ours=ours)
    elif opened.optimizer:
        dropped["optimizer state"] = "of some weights only: the others are frozen"
    has_rounded = any(name in module and module[name].dtype != stored[name].dtype for name in stored)
    stage = opened.settings.get("zero_optimization", {}).get("stage", 0)
    tokenizers = (find_tokenizer(folder) for folder in (opened.folder, opened.folder.parent))
    return Source(
        path=opened.folder,
        format=FORMAT,
        model=model,
        weights=weights,
        stored=stored,
        layout="universal" if opened.universal else f"ZeRO {stage}",
        step=opened.step or 0,
        dropped=dropped,
        optimizer=optimizer,
        rounded=ours(module) if has_rounded else {},
        tokenizer=next((found for found in tokenizers if found is not None), None),
        fingerprint=read_fingerprint(opened.folder),
    )


def _plain(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """By the names of Transformers' files, without the prefix of a module that was wrapped."""
    plain = {_WRAPPED.sub("", name): tensor for name, tensor in tensors.items()}
    if not any("gpt_neox." in name for name in plain):
        return plain
    file, module = _NEOX_OUTPUT
    return {name.replace(module, file): tensor for name, tensor in plain.items()}


def write_folder(target: TargetSpec) -> None:
    """Write a checkpoint of a Transformers model, with its config.json: a universal one, which any ZeRO stage and number of
    ranks loads, or one of ZeRO-1. All weights are in one parameter group, as `model.parameters()` are."""
    model, layout, adam = target.source.model, target.layout, target.source.optimizer
    if (layout.tensor_parallel, layout.pipeline_parallel, layout.expert_parallel) != (1, 1, 1):
        raise CheckpointError(f"a DeepSpeed target has no {layout}: it is loaded by any number of data-parallel ranks")
    if layout.zero_stage not in (0, 1) or (layout.data_parallel > 1 and not layout.zero_stage):
        raise CheckpointError(
            f"ZeRO stage {layout.zero_stage} for {layout.data_parallel} ranks cannot be written: name --zero-stage 1 and "
            "--data-parallel, or neither for a universal checkpoint, which any stage and number of ranks loads"
        )

    write_config(model, target.folder, dtype=target.dtype)
    names = parameter_names(target.folder)

    def theirs(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        found = to_huggingface_lazily(weights, model.shape, vocabulary_size=model.vocabulary_size)
        renamed = {name: name if name in names else name.replace(*_NEOX_OUTPUT) for name in found}
        return {renamed[name]: tensor for name, tensor in found.items()}

    tensors = theirs(target.weights)
    embedding = next(row.theirs[0] for row in rows(model.shape) if row.ours == WORD_EMBEDDINGS)
    optimizer: dict[str, LazyTensor] = {}
    if adam is not None:
        optimizer = adam.named(theirs) | {f"fp32/{name}": one for name, one in theirs(target.source.weights).items()}
    settings = {**DEFAULTS, **(adam.settings if adam else {})}
    state = DeepSpeedState(
        tensors=tensors,
        groups=[ParameterGroup(settings, [name for name in names if name in tensors])],
        optimizer=optimizer,
        optimizer_step=adam.step if adam else 0,
        step=target.step,
        dtype=target.dtype,
        shared={name: embedding for name in names if name not in tensors},
    )
    if layout.zero_stage:
        folder = write_zero1(target.folder, state, data_parallel=layout.data_parallel)
    else:
        folder = write_universal(target.folder, state)
    if target.source.tokenizer is not None:
        copy_tokenizer(target.source.tokenizer, target.folder, context_length=model.context_length)
    target.fingerprint.save(folder)
