"""Checkpoints of Megatron-LM and Megatron-Core, in the formats `torch_dist` and `torch` (legacy), read and written."""

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.config.architectures import SPECIAL_IDS, Model
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.convert import megatron_legacy, megatron_legacy_writing, torch_dist, torch_dist_writing
from megatron_specialm.convert.adam import DEFAULTS, MOMENTS, AdamState, read_adam
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.lazy import LazyTensor, cast, stacked, with_rows
from megatron_specialm.convert.megatron_moe import check_experts, expert_parts, megatron_expert_name, spec_of
from megatron_specialm.convert.megatron_names import (
    EXTRA_STATE,
    canonical_names,
    from_megatron,
    joined_ranks,
    megatron_name,
    padded_rows,
    rank_part,
    read_settings,
    settings_of,
)
from megatron_specialm.convert.megatron_older import present_names, present_order
from megatron_specialm.convert.safe_pickle import COPY_AGAIN, opens
from megatron_specialm.convert.source import Layout, Source, TargetSpec
from megatron_specialm.convert.tokenizer_files import TOKENIZER, copy_tokenizer
from megatron_specialm.model.weights import LINEAR_PLACES, OUTPUT_LAYER, WORD_EMBEDDINGS, WeightSpec, weight_specs

FORMAT, LEGACY = "megatron", "megatron-legacy"
_IDS = "generation_config.json"  # as Transformers has it: special ids
_VERSION = 3.0  # `checkpoint_version` of what is written
_LAYER = re.compile(r"decoder\.layers\.\d+\.(?P<rest>.+)")
_BUFFERS = (
    "Megatron-Core's distributed optimizer saved its buffers, whose order is the layout's: save with "
    "--dist-ckpt-optim-fully-reshardable"
)
LEGACY_OPTIMIZER = "it is numbered by the parameters of each rank's modules, and which they are is not in the files"
_FULLY_RESHARDABLE = "fully_reshardable"
_FROZEN = "of some weights only: the others are frozen"
# Of the parameter groups that Megatron-LM makes: weights that decay, and biases and norms, which do not.
_GROUP = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "bias_correction": True}


@opens("a checkpoint of Megatron-Core")
def open_torch_dist(path: Path, given: Model | None) -> Source:
    """Open a checkpoint of `torch_dist`.

    Args:
        given: the model, if not the one that the settings in the checkpoint describe.

    Raises:
        CheckpointError: it is damaged or incomplete, or of a model that we do not have.
    """
    opened = torch_dist.open_torch_dist(path)
    stored, where = opened.tensors, opened.folder
    model = given or _described(opened.settings, where, embedding_rows(stored, where))
    main = {
        name: one
        for name, tensor in stored.items()
        if (one := opened.optimizer.get(f"fp32/{name}")) is not None
        and tensor.dtype != torch.float32
        and one.shape == tensor.shape
    }
    optimizer, left = _adam(opened, model)
    stacked = any(name.startswith("decoder.layers.") and not name[len("decoder.layers.")].isdigit() for name in stored)
    objects = [name for name in opened.objects if not name.startswith("optimizer")]
    states = [name for name in objects if name.split("/")[0].endswith(EXTRA_STATE)]
    folder = where.parent / TOKENIZER
    weights = from_megatron(stored, model, where=where)
    return Source(
        path=where,
        format=FORMAT,
        model=model,
        weights=from_megatron({**stored, **main}, model, where=where) if main else weights,
        stored=stored,
        layout=f"torch_dist, {'all layers in one tensor' if stacked else 'a tensor per layer'}",
        step=opened.step or 0,
        dropped=counted({
            "optimizer state": (len(opened.optimizer) + len(opened.others) if left else 0, left),
            EXTRA_STATE: (len(states), "FP8 scales of Transformer Engine, which it finds again"),
            "other objects": (len(objects) - len(states), "random states and the like"),
        }),
        optimizer=optimizer,
        rounded=weights if main else {},
        tokenizer=folder if folder.is_dir() else None,
        fingerprint=read_fingerprint(where),
    )  # fmt: skip


def _described(settings: Mapping[str, Any], folder: Path, rows: int) -> Model:
    """The model of an iteration, by Megatron-LM's settings and the special ids that `_finish` has written."""
    path = folder / _IDS
    ids = read_json(path, dict[str, Any], remedy=COPY_AGAIN) if path.is_file() else {}
    model = read_settings(settings, where=folder, rows=rows)
    return replace(model, special_ids={name: ids[name] for name in SPECIAL_IDS if name in ids})


def _adam(opened: torch_dist.TorchDist, model: Model) -> tuple[AdamState | None, str]:
    """Adam's state, or why there is none."""
    kinds = [name.partition("/")[0] for name in opened.optimizer]
    if any(kinds.count(kind) < len(opened.tensors) for kind in MOMENTS):
        return None, _BUFFERS if opened.others else _FROZEN
    try:
        found = read_adam(
            opened.optimizer,
            step=opened.optimizer_step,
            groups=opened.groups,
            ours=lambda moments: from_megatron(moments, model, where=opened.folder),
        )
    except CheckpointError as error:
        return None, str(error)
    return found, "" if found else "it does not say how many updates were made"


@opens("a checkpoint of Megatron-LM")
def open_legacy(path: Path, given: Model | None) -> Source:
    """Open a checkpoint of a file per rank; see `open_torch_dist`."""
    opened = megatron_legacy.open_megatron_legacy(path)
    ranks = [canonical_names(present_names(shard), opened.folder) for shard in opened.shards]
    rows = sum(embedding_rows(rank, opened.folder) for rank in ranks)
    model = given or _described(opened.settings, opened.folder, rows)
    ranks = [
        present_order(rank, opened.version, model.shape, tensor_parallel=len(ranks), where=opened.folder)
        for rank in ranks
    ]
    specs = weight_specs(model.shape, vocabulary_size=model.vocabulary_size)
    dropped = {"optimizer state": LEGACY_OPTIMIZER} if opened.has_optimizer else {}
    if model.shape.tie_embeddings and OUTPUT_LAYER in ranks[0]:
        dropped[OUTPUT_LAYER] = f"the last pipeline stage's copy of {WORD_EMBEDDINGS}"
        for rank in ranks:
            if not torch.equal(rank[WORD_EMBEDDINGS][()], rank.pop(OUTPUT_LAYER)[()]):
                raise CheckpointError(
                    f"{opened.folder}: {OUTPUT_LAYER} differs from {WORD_EMBEDDINGS}, and they are tied"
                )
    whole = {
        name: joined_ranks([rank[name] for rank in ranks], spec_of(name, specs), name=name, where=opened.folder)
        for name in ranks[0]
    }
    folder = opened.folder.parent / TOKENIZER
    return Source(
        path=opened.folder,
        format=FORMAT,
        model=model,
        weights=from_megatron(whole, model, where=opened.folder),
        stored=whole,
        layout=f"legacy, tensor_parallel {len(ranks)}, pipeline_parallel "
        f"{opened.settings.get('pipeline_model_parallel_size', 1)}"
        + (f", expert_parallel {opened.settings.get('expert_model_parallel_size', 1)}" if model.shape.moe else ""),
        step=opened.step or 0,
        dropped=dropped,
        tokenizer=folder if folder.is_dir() else None,
        fingerprint=read_fingerprint(opened.folder),
    )


def write_torch_dist(target: TargetSpec) -> None:
    """Write an iteration in the form that Megatron-Core gives to models of equal layers: `release` without the optimizer's
    state. Any layout loads it; the target's decides the embedding's padding and the settings."""
    shape, adam = target.source.model.shape, target.source.optimizer
    tensors = _named(_padded(target), shape)
    common = {"args": argparse.Namespace(**_typed_settings(target)), "checkpoint_version": _VERSION}
    moments: dict[str, LazyTensor] = {}
    if adam is not None:
        rows = tensors[WORD_EMBEDDINGS].shape[0]
        moments = adam.named(lambda weights: _named(_with_rows(weights, rows), shape))
        main = {name: cast(tensor, torch.float32) for name, tensor in target.source.weights.items()}
        moments |= {f"fp32/{name}": tensor for name, tensor in _named(_with_rows(main, rows), shape).items()}
        common |= _common_of(adam)
    objects = list(_extra_states(shape))
    folder = torch_dist_writing.write_torch_dist(
        target.folder,
        tensors,
        step=target.step or None,
        common={**common, "iteration": target.step},
        optimizer=moments,
        objects=objects,
        files=target.threads,
    )
    _finish(target, folder)


def _are_equal(shape: ModelConfig) -> bool:
    """Whether all layers have the same weights, and so stand in one tensor."""
    return shape.moe is None or shape.moe.every == 1


def _named(weights: Mapping[str, LazyTensor], shape: ModelConfig) -> dict[str, LazyTensor]:
    """Canonical weights by Megatron's names; of equal layers all in one tensor."""
    stacks: dict[str, list[LazyTensor]] = {}
    found: dict[str, LazyTensor] = {}
    for canonical, tensor in weights.items():
        name = megatron_expert_name(megatron_name(canonical, shape))
        if _are_equal(shape) and (layer := _LAYER.fullmatch(name)):
            stacks.setdefault(f"decoder.layers.{layer['rest']}", []).append(tensor)
        else:
            found[name] = tensor
    return found | {name: stacked(parts) for name, parts in stacks.items()}


def _extra_states(shape: ModelConfig) -> Iterator[str]:
    """The names of the states of FP8 that Megatron-Core's linears have."""
    attention, dense = (LINEAR_PLACES["qkv"], LINEAR_PLACES["proj"]), (LINEAR_PLACES["fc1"], LINEAR_PLACES["fc2"])
    are_equal = _are_equal(shape)
    for layer in range(shape.layers):
        place, shard, count = ("", f"{layer}", f"{shape.layers}") if are_equal else (f"{layer}.", "0", "1")
        experts = shape.experts_of(layer)
        shared = dense if experts and shape.moe is not None and shape.moe.shared_expert else ()
        for name in (*attention, *(() if experts else dense)):
            yield f"decoder.layers.{place}{name}.{EXTRA_STATE}/shard_{shard}_{count}"
        for name in shared:
            own = name.replace("mlp.", "mlp.shared_experts.")
            yield f"decoder.layers.{place}{own}.{EXTRA_STATE}/shard_{shard}_{count}"
        for name, expert in product(dense, range(experts)):
            own = name.replace("mlp.", "mlp.experts.experts.")
            index = f"{layer}.{expert}_{shape.layers}.{experts}" if are_equal else f"{expert}_{experts}"
            yield f"decoder.layers.{place}{own}.{EXTRA_STATE}/shard_{index}"


def _common_of(adam: AdamState) -> dict[str, Any]:
    """What common.pt has of the optimizer: of the distributed one in the form `fully_reshardable`, and of the plain one in
    fp32, whose tensors have the same names."""
    settings = {**DEFAULTS, **adam.settings, **_GROUP, "step": adam.step}
    groups = [{**settings, "wd_mult": 1.0}, {**settings, "wd_mult": 0.0, "weight_decay": 0.0}]
    distributed = {"optimizer": {"param_groups": groups}, "param_state_sharding_type": _FULLY_RESHARDABLE}
    plain = {"state": {"common_step": torch.tensor(float(adam.step))}, "param_groups": groups}
    return {
        "optimizer": {**distributed, **plain},
        "content_metadata": {"distrib_optim_sharding_type": _FULLY_RESHARDABLE, "singleton_local_shards": False},
    }


def write_legacy(target: TargetSpec) -> None:
    """Write an iteration `release` with a file per rank."""
    weights, model, layout = _padded(target), target.source.model, target.layout
    if model.shape.tie_embeddings and layout.pipeline_parallel > 1:
        weights[OUTPUT_LAYER] = weights[WORD_EMBEDDINGS]
    specs = weight_specs(model.shape, vocabulary_size=weights[WORD_EMBEDDINGS].shape[0])
    specs.setdefault(OUTPUT_LAYER, specs[WORD_EMBEDDINGS])
    named = dict(_in_modules(weights, specs, model.shape))
    shards = [
        {
            name: rank_part(tensor, spec, rank=rank, size=layout.tensor_parallel)
            for name, (tensor, spec) in named.items()
        }
        for rank in range(layout.tensor_parallel)
    ]
    stages = layout.pipeline_parallel
    folder = megatron_legacy_writing.write_megatron_legacy(
        target.folder,
        shards,
        settings=_typed_settings(target),
        step=None,
        stage_layers=[model.shape.layers // stages] * stages,
        expert_parallel=layout.expert_parallel,
    )
    _finish(target, folder)


def _in_modules(
    weights: Mapping[str, LazyTensor], specs: Mapping[str, WeightSpec], shape: ModelConfig
) -> Iterator[tuple[str, tuple[LazyTensor, WeightSpec]]]:
    """The weights by their names in Megatron-Core's modules, in which each expert has its own."""
    for canonical, tensor in weights.items():
        name = megatron_name(canonical, shape)
        parts = expert_parts(name, tensor) if specs[canonical].is_expert else [(megatron_expert_name(name), tensor)]
        for own, one in parts:
            yield own, (one, spec_of(own, specs) or specs[canonical])


def check_layout(model: Model, layout: Layout) -> None:
    """Refuse a layout that does not divide a model, and a model that Megatron-Core does not have.

    Raises:
        CheckpointError: naming the degree and the number that it does not divide.
    """
    shape = model.shape
    divided = [("heads", shape.attention_heads), ("query groups", shape.kv_heads)]
    parts = (part for layer in range(shape.layers) for part in shape.feed_forward_parts(layer))
    divided += [("ffn_hidden_size", part.ffn_hidden_size) for part in parts]
    for what, number in divided:
        if number % layout.tensor_parallel:
            raise CheckpointError(
                f"tensor_parallel {layout.tensor_parallel} does not divide the model's {number} {what}: choose a "
                "--tensor-parallel that does"
            )
    if shape.layers % layout.pipeline_parallel:
        raise CheckpointError(
            f"pipeline_parallel {layout.pipeline_parallel} does not divide the model's {shape.layers} layers: choose a "
            "--pipeline-parallel that does"
        )
    check_experts(shape, layout)
    _settings(model, layout)


def _padded(target: TargetSpec) -> dict[str, LazyTensor]:
    """The weights, with Megatron-LM's padding of the vocabulary."""
    rows = padded_rows(target.source.model.vocabulary_size, tensor_parallel=target.layout.tensor_parallel)
    return _with_rows(target.weights, rows)


def _with_rows(weights: Mapping[str, LazyTensor], rows: int) -> dict[str, LazyTensor]:
    """Weights or moments, with so many rows of embeddings."""
    return {
        name: with_rows(tensor, rows) if name in (WORD_EMBEDDINGS, OUTPUT_LAYER) else tensor
        for name, tensor in weights.items()
    }


def _settings(model: Model, layout: Layout) -> dict[str, Any]:
    return settings_of(
        model,
        tensor_parallel=layout.tensor_parallel,
        pipeline_parallel=layout.pipeline_parallel,
        expert_parallel=layout.expert_parallel,
    )


def _typed_settings(target: TargetSpec) -> dict[str, Any]:
    settings, dtype = _settings(target.source.model, target.layout), target.dtype
    return {**settings, "params_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": False}


def _finish(target: TargetSpec, folder: Path) -> None:
    target.fingerprint.save(folder)
    if ids := target.source.model.special_ids:  # Megatron-LM has them from its tokenizer, with a single end token
        write_json(folder / _IDS, dict(ids))
    if target.source.tokenizer is not None:
        copy_tokenizer(
            target.source.tokenizer, target.folder / TOKENIZER, context_length=target.source.model.context_length
        )


def counted(found: Mapping[str, tuple[int, str]]) -> dict[str, str]:
    """What is left out, with its number."""
    return {f"{name} ({count})": reason for name, (count, reason) in found.items() if count}


def embedding_rows(stored: Mapping[str, LazyTensor], where: Path) -> int:
    """Rows of the embedding, with its padding."""
    if WORD_EMBEDDINGS not in stored:
        raise CheckpointError(f"{where}: has no {WORD_EMBEDDINGS}: it is not complete, or of no GPT model")
    return stored[WORD_EMBEDDINGS].shape[0]
