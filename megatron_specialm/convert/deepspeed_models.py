"""DeepSpeed's checkpoints as canonical weights and back. They have the names of the module that was trained: of Transformers or
of Megatron-Core; and do not say which model it is."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.config.architectures import CONFIG, Model, architecture_of, read_config
from megatron_specialm.convert.adam import DEFAULTS, MOMENTS, read_adam
from megatron_specialm.convert.deepspeed_folder import ParameterGroup, open_deepspeed
from megatron_specialm.convert.deepspeed_partitions import EXPERT, experts_of
from megatron_specialm.convert.deepspeed_writing import (
    DeepSpeedState,
    check_expert_parallel,
    write_universal,
    write_zero1,
)
from megatron_specialm.convert.expert_names import deepspeed_name, deepspeed_names, table_names
from megatron_specialm.convert.families import from_huggingface_lazily, rows, to_huggingface_lazily, to_modules_lazily
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.huggingface_folder import parameter_names, without_copies, write_config
from megatron_specialm.convert.lazy import LazyTensor, zeros
from megatron_specialm.convert.megatron_names import canonical_names, from_megatron
from megatron_specialm.convert.qwen2_moe import counted_zeros, without_zeros, zero_shapes
from megatron_specialm.convert.safe_pickle import opens
from megatron_specialm.convert.source import Layout, Source, TargetSpec
from megatron_specialm.convert.tokenizer_files import copy_tokenizer, find_tokenizer
from megatron_specialm.model.weights import WORD_EMBEDDINGS

FORMAT = "deepspeed"
GROUP_ELEMENTS = 178_956_971  # of a rank's experts in a parameter group, at most, by DeepSpeed's default
_NEOX_OUTPUT = ("embed_out.", "lm_head.")  # GPT-NeoX's output layer in files, and in the module since Transformers 5
_WRAPPED = re.compile(r"(?<![\w.])module\.")


@opens("a checkpoint of DeepSpeed")
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
    stored, module, moments = (_plain(tensors) for tensors in (opened.tensors, opened.module, opened.optimizer))
    model, empty = without_zeros(stored, model)
    dropped = counted_zeros(empty)

    def ours(theirs: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        tensors = {name: tensor for name, tensor in theirs.items() if name not in empty}
        if any(name.startswith("decoder.") for name in tensors):
            named = {name.replace(".mlp.gate.", ".mlp.router."): one for name, one in table_names(tensors).items()}
            return from_megatron(canonical_names(named, opened.folder), model, where=opened.folder)
        used, copies = without_copies(opened.folder, tensors, model)
        dropped.update(copies)
        return from_huggingface_lazily(used, model.shape, vocabulary_size=model.vocabulary_size, where=opened.folder)

    weights, optimizer = ours(stored), None
    if all(f"{kind}/{name}" in moments for kind in MOMENTS for name in stored if name not in dropped):
        groups = [group.settings for group in opened.groups]
        optimizer = read_adam(moments, step=opened.optimizer_step, groups=groups, ours=ours)
    elif opened.optimizer:
        dropped["optimizer state"] = "of some weights only: the others are frozen"
    has_rounded = any(name in module and module[name].dtype != stored[name].dtype for name in stored)
    tokenizers = (find_tokenizer(folder) for folder in (opened.folder, opened.folder.parent))
    return Source(
        path=opened.folder,
        format=FORMAT,
        model=model,
        weights=weights,
        stored=stored,
        layout="universal" if opened.universal else f"ZeRO {opened.stage}",
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
    ranks loads, or one of ZeRO-1. All weights are in one parameter group, as `model.parameters()` are.

    A mixture of experts is Transformers' own in a universal checkpoint. In one of ZeRO-1 its MoE layers are DeepSpeed's, whose
    experts have files and a parameter group of their own."""
    model, layout, adam = target.source.model, target.layout, target.source.optimizer
    shape = model.shape
    deals_experts = _deals_experts(model, layout)
    write_config(model, target.folder, dtype=target.dtype)
    names = parameter_names(target.folder)
    if deals_experts:
        names = list(deepspeed_names(names, shape.moe.counts[0]))  # type: ignore[union-attr]

    def theirs(weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        missing = {name: zeros(own, target.dtype) for name, own in zero_shapes(shape).items()}
        if deals_experts:
            found = to_huggingface_lazily(weights, shape, vocabulary_size=model.vocabulary_size) | missing
            return {deepspeed_name(name): tensor for name, tensor in found.items()}
        found = to_modules_lazily(weights, shape, vocabulary_size=model.vocabulary_size) | missing
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
        groups=_groups(settings, {name: tensors[name] for name in names if name in tensors}, layout.expert_parallel),
        optimizer=optimizer,
        optimizer_step=adam.step if adam else 0,
        step=target.step,
        dtype=target.dtype,
        shared={name: embedding for name in names if name not in tensors},
    )
    if layout.zero_stage:
        folder = write_zero1(
            target.folder, state, data_parallel=layout.data_parallel, expert_parallel=layout.expert_parallel
        )
    else:
        folder = write_universal(target.folder, state)
    if target.source.tokenizer is not None:
        copy_tokenizer(target.source.tokenizer, target.folder, context_length=model.context_length)
    target.fingerprint.save(folder)


def check_layout(model: Model, layout: Layout) -> None:
    """Refuse a layout that is not written, and a model that Transformers does not have.

    Raises:
        CheckpointError: naming the options.
    """
    architecture_of(model.shape)
    if layout.expert_parallel > 1 and not _deals_experts(model, layout):
        raise CheckpointError(
            f"expert_parallel {layout.expert_parallel}: --expert-parallel is of a mixture of experts with --zero-stage 1"
        )
    if layout.zero_stage not in (0, 1) or (layout.data_parallel > 1 and not layout.zero_stage):
        raise CheckpointError(
            f"ZeRO stage {layout.zero_stage} for {layout.data_parallel} ranks cannot be written: name --zero-stage 1 and "
            "--data-parallel, or neither for a universal checkpoint, which any stage and number of ranks loads"
        )
    if model.shape.moe is not None:
        check_expert_parallel(layout.expert_parallel, layout.data_parallel, model.shape.moe.counts)


def _deals_experts(model: Model, layout: Layout) -> bool:
    """Whether MoE layers are DeepSpeed's, which deals experts out over ranks."""
    return model.shape.moe is not None and layout.zero_stage == 1


def _groups(
    settings: Mapping[str, Any], tensors: Mapping[str, LazyTensor], expert_parallel: int
) -> list[ParameterGroup]:
    """All weights in one group; experts of DeepSpeed's layers in groups of their own, as its
    `split_params_into_different_moe_groups_for_optimizer` makes them of the parameters of a rank."""
    others = ParameterGroup(settings, [name for name in tensors if not EXPERT.fullmatch(name)])
    counts = experts_of(tensors)
    experts: list[list[str]] = []
    numbers: dict[tuple[str, int, str], int] = {}  # of groups, by a rank's parameters
    room = 0
    for name, match in ((name, match) for name in tensors if (match := EXPERT.fullmatch(name))):
        per_rank = max(1, counts[match["layer"]] // expert_parallel)
        local = match["layer"], int(match["expert"]) % per_rank, match["rest"]
        if local not in numbers:
            size = math.prod(tensors[name].shape)
            if size > room:
                experts.append([])
                room = GROUP_ELEMENTS
            numbers[local], room = len(experts) - 1, room - size
        experts[numbers[local]].append(name)
    own = {**settings, "name": f"ep_size_{expert_parallel}", "moe": True}
    return [others, *(ParameterGroup(own, names) for names in experts)]
