"""Checkpoints of DeepSpeed: ZeRO stages 0 to 3, with experts, and universal checkpoints.

latest                                          the name of the last step's folder, TAG
TAG/mp_rank_00_model_states.pt                  the module's weights (of stage 3: zero_pp_rank_D_mp_rank_00_..., without)
TAG/layer_L_expert_E_mp_rank_00_model_states.pt expert E of the MoE layer L, counted over all ranks
TAG/[bf16_]zero_pp_rank_D_mp_rank_00_optim_states.pt    what rank D owns of fp32 weights and Adam's moments, flattened
TAG/zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt      of a universal checkpoint: whole tensors
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_regular
from megatron_specialm.convert.deepspeed_partitions import (
    EXPERT,
    Partitions,
    experts_of,
    partitioned_tensors,
    renumbered,
)
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.safe_pickle import COPY_AGAIN, decoding, inert
from megatron_specialm.convert.stored import FileTensor, FlatTensor, Run
from megatron_specialm.convert.torch_zip import read_state_dict, read_torch_zip

_MODEL = re.compile(r"(zero_pp_rank_(?P<data>\d+)_)?mp_rank_(?P<tensor>\d+)_model_states\.pt")
_EXPERT_FILE = re.compile(r"layer_(?P<layer>\d+)_expert_(?P<expert>\d+)_mp_rank_00_model_states\.pt")
_PIPELINE_FILE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?P<prefix>(bf16_|fp16_)?)zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")
_ALLOWED = inert("deepspeed.*")
_MERGE = "make a universal checkpoint of it (`python -m deepspeed.checkpoint.ds_to_universal`), and convert that"


class ParameterGroup(NamedTuple):
    """A parameter group of the optimizer: learning rate, weight decay and the like, and the weights in it, in the module's
    order."""

    settings: Mapping[str, Any]
    names: Sequence[str]


@dataclass(frozen=True)
class DeepSpeedFolder:
    """A checkpoint of DeepSpeed.

    `tensors` are the weights and buffers by their names in the module, in fp32 where the optimizer has that, `optimizer` has
    `exp_avg/NAME` and `exp_avg_sq/NAME`. `module` are the weights as the module has them, in its own type; in stage 3 it has
    none. `shared` names, for a tied weight that is left out, the one that it equals.
    `settings` is DeepSpeed's config. `stage` is that of ZeRO.
    """

    folder: Path
    universal: bool
    tensors: Mapping[str, LazyTensor]
    optimizer: Mapping[str, LazyTensor]
    optimizer_step: int | None
    module: Mapping[str, LazyTensor]
    shared: Mapping[str, str]
    groups: Sequence[ParameterGroup]
    settings: Mapping[str, Any]
    stage: int
    step: int | None


def recognize(path: Path) -> bool:
    """Whether a folder, or the step that its `latest` names, is a checkpoint of DeepSpeed."""
    patterns = (_MODEL, _PIPELINE_FILE, _OPTIMIZER_FILE)
    return (folder := _tag_folder(path)).is_dir() and any(
        pattern.fullmatch(file.name) for file in folder.iterdir() for pattern in patterns
    )


def open_deepspeed(path: Path) -> DeepSpeedFolder:
    """Open a checkpoint. Headers are read, tensors are not.

    Args:
        path: the folder that DeepSpeed saved to, of which the last step is taken, or a step's folder.

    Raises:
        CheckpointError: a file is missing or damaged, an expert is missing, a pickle asks for code, or it was saved under
            tensor or pipeline parallelism.
    """
    folder = _tag_folder(path)
    files = {file.name: _MODEL.fullmatch(file.name) for file in sorted(folder.iterdir())}
    models = [folder / name for name, match in files.items() if match]
    if any(_PIPELINE_FILE.fullmatch(name) for name in files):
        raise CheckpointError(f"{folder}: was saved by a pipeline module: {_MERGE}")
    if not models:
        raise CheckpointError(f"{folder}: has no mp_rank_00_model_states.pt: {COPY_AGAIN}")
    with decoding(models[0], "a checkpoint of DeepSpeed"):
        state = read_torch_zip(models[0], _ALLOWED)
        if (folder / "zero").is_dir():
            return _open_universal(folder, state)
        if state["mp_world_size"] != 1:
            raise CheckpointError(f"{folder}: was saved with tensor parallelism {state['mp_world_size']}: {_MERGE}")
        count = state["dp_world_size"]
        ranks = {name: (int(match["data"] or 0), int(match["tensor"])) for name, match in files.items() if match}
        _refuse_others(folder, [name for name, (data, tensor) in ranks.items() if data >= count or tensor], count)
        return _open_zero(folder, models, state)


def _tag_folder(path: Path) -> Path:
    for name in ("latest", "latest_universal"):
        if (path / name).is_file():
            with decoding(path / name, "the name of a step's folder"):
                tag = read_regular(path / name, most_bytes=1000).decode().strip()
                if Path(tag).name != tag:
                    raise ValueError(f"{tag!r} is not a name")
            if not (path / tag).is_dir():
                raise CheckpointError(f"{path / name}: names {tag}, and {path / tag} does not exist: {COPY_AGAIN}")
            return path / tag
    return path


def _open_zero(folder: Path, models: list[Path], state: dict[str, Any]) -> DeepSpeedFolder:
    experts, per_layer = _experts(folder, state)
    frozen = dict(_frozen(models, state))
    if experts and (state.get("ds_config") or {}).get("use_data_before_expert_parallelism"):
        raise CheckpointError(
            f"{folder}: use_data_before_expert_parallelism deals experts out in an order that is not read"
        )
    partitions = _partitions(folder, state)
    module: Mapping[str, LazyTensor] = {**_module(state), **experts, **frozen}
    weights = module
    optimizer: dict[str, LazyTensor] = {}
    if partitions is not None:
        shapes = {
            name: shape
            for group in state["param_shapes"]
            for name, shape in group.items()
            if not EXPERT.fullmatch(name)
        }
        shapes.update({name: tensor.shape for name, tensor in experts.items()})
        found = partitioned_tensors(partitions, shapes, per_layer)
        weights = {
            **weights,
            **{name.removeprefix("fp32/"): one for name, one in found.items() if name.startswith("fp32/")},
        }
        optimizer = {name: one for name, one in found.items() if not name.startswith("fp32/")}
        if lost := sorted(name for name in shapes if name not in weights):
            raise CheckpointError(
                f"{folder}: {lost[0]} is in no optimizer file ({len(lost)} are missing): {COPY_AGAIN}"
            )
    if partitions is None:
        return _found(folder, state, weights, optimizer, module, [], None)
    return _found(folder, state, weights, optimizer, module, partitions.groups, partitions.step, stage=partitions.stage)


def _module(state: Mapping[str, Any]) -> dict[str, LazyTensor]:
    shared, module = state.get("shared_params") or {}, state.get("module") or {}
    return {name: one for name, one in module.items() if isinstance(one, FileTensor) and name not in shared}


def _experts(folder: Path, state: dict[str, Any]) -> tuple[dict[str, LazyTensor], dict[str, int]]:
    """The experts' tensors, and the number of experts of each layer by the prefix of its experts' names."""
    counts = state.get("num_experts") or []
    found: dict[str, LazyTensor] = {}
    for layer, count in enumerate(counts if isinstance(counts, list) else [counts]):
        for expert in range(count):
            path = folder / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
            if not path.is_file():
                raise CheckpointError(
                    f"{path}: is missing: the checkpoint says {count} experts in MoE layer {layer}: {COPY_AGAIN}"
                )
            for name, tensor in read_state_dict(path, _ALLOWED).items():
                match = EXPERT.fullmatch(name)
                if match is None or int(match["expert"]) != expert or name in found:
                    raise CheckpointError(
                        f"{path}: has {name}, which is not of expert {expert} or is there twice: {COPY_AGAIN}"
                    )
                found[name] = tensor
    if extra := [
        file.name
        for file in folder.iterdir()
        if (one := _EXPERT_FILE.fullmatch(file.name)) and not _listed(one, counts)
    ]:
        raise CheckpointError(f"{folder / extra[0]}: the checkpoint says that there is no such expert: {COPY_AGAIN}")
    return found, experts_of(found)


def _listed(file: re.Match[str], counts: list[int]) -> bool:
    return int(file["layer"]) < len(counts) and int(file["expert"]) < counts[int(file["layer"])]


def _frozen(models: list[Path], state: dict[str, Any]) -> Iterator[tuple[str, LazyTensor]]:
    """Parameters that are not trained; ZeRO-3 partitions them over the ranks' model files."""
    shapes = state.get("frozen_param_shapes") or {}
    if not shapes or len(models) == 1:
        return
    fragments = [read_torch_zip(path, _ALLOWED)["frozen_param_fragments"] for path in models]
    for name, shape in shapes.items():
        count = -(-math.prod(shape) // len(models))
        runs = [
            Run(rank * count, min(count, max(0, math.prod(shape) - rank * count)), own[name], 0)
            for rank, own in enumerate(fragments)
        ]
        yield name, FlatTensor(name, tuple(shape), runs, models[0].parent)


def _partitions(folder: Path, state: dict[str, Any]) -> Partitions | None:
    """The optimizer files of all ranks; None without ZeRO, or if only the weights were kept."""
    found = {file.name: match for file in sorted(folder.iterdir()) if (match := _OPTIMIZER_FILE.fullmatch(file.name))}
    if not found:
        return None
    count, prefix = state["dp_world_size"], next(iter(found.values()))["prefix"]
    expected = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(count)]
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{folder / missing[0]}: is missing: {count} ranks saved: {COPY_AGAIN}")
    _refuse_others(folder, found.keys() - set(expected), count)
    ranks = [read_torch_zip(folder / name, _ALLOWED)["optimizer_state_dict"] for name in expected]
    return Partitions(folder, ranks, state["param_shapes"])


def _refuse_others(folder: Path, names: Iterable[str], ranks: int) -> None:
    """Refuse files of ranks that did not save: every tensor is used."""
    for name in sorted(names):
        raise CheckpointError(
            f"{folder / name}: {ranks} data-parallel ranks saved, and this is no file of theirs: move it away if it is of "
            "another checkpoint"
        )


def _open_universal(folder: Path, state: dict[str, Any]) -> DeepSpeedFolder:
    shared = state.get("shared_params") or {}
    found: dict[str, LazyTensor] = {}
    for path in sorted((folder / "zero").glob("*/*.pt")):
        name, kind = path.parent.name, path.stem
        if name not in shared and kind != "step":
            found[f"{kind}/{name}"] = _tensor(read_torch_zip(path, _ALLOWED), path)
    weights = {name.removeprefix("fp32/"): tensor for name, tensor in found.items() if name.startswith("fp32/")}
    moments = {name: tensor for name, tensor in found.items() if not name.startswith("fp32/")}
    common = folder / "zero" / "optimizer_state.pt"
    for name in (name for group in state.get("param_shapes") or [] for name in group):
        if name not in weights:
            raise CheckpointError(f"{folder / 'zero' / name / 'fp32.pt'}: is missing: {COPY_AGAIN}")
    groups = read_torch_zip(common, _ALLOWED)["param_groups"] if common.is_file() else []
    step = next(iter(sorted((folder / "zero").glob("*/step.pt"))), None)
    count = None if step is None else int(read_torch_zip(step, _ALLOWED)[()])
    return _found(folder, state, weights, moments, _module(state), groups, count, universal=True)


def _tensor(content: Any, path: Path) -> LazyTensor:
    """A tensor, alone or as `param` of a universal checkpoint's file."""
    tensor = content.get("param") if isinstance(content, dict) else content
    if not isinstance(tensor, FileTensor):
        raise CheckpointError(f"{path}: has no tensor where one should be: {COPY_AGAIN}")
    return tensor


def _found(
    folder: Path,
    state: Mapping[str, Any],
    weights: Mapping[str, LazyTensor],
    optimizer: Mapping[str, LazyTensor],
    module: Mapping[str, LazyTensor],
    settings: Sequence[Mapping[str, Any]],
    optimizer_step: int | None,
    *,
    universal: bool = False,
    stage: int = 0,
) -> DeepSpeedFolder:
    names = state.get("param_shapes") or []
    per_rank = experts_of({name: None for group in names for name in group})
    return DeepSpeedFolder(
        folder=folder,
        universal=universal,
        tensors=weights,
        optimizer=optimizer,
        optimizer_step=optimizer_step,
        module=module,
        shared=state.get("shared_params") or {},
        groups=[
            ParameterGroup(own, list(_all_experts(shapes, per_rank, experts_of(weights))))
            for own, shapes in zip(settings, names, strict=False)
        ],
        settings=state.get("ds_config") or {},
        stage=stage,
        step=state.get("global_steps"),
    )


def _all_experts(names: Iterable[str], per_rank: Mapping[str, int], counts: Mapping[str, int]) -> Iterator[str]:
    """The names of a group with the experts of all ranks: the checkpoint lists those of rank 0."""
    for layer, own in itertools.groupby(names, lambda name: (match := EXPERT.fullmatch(name)) and match["layer"]):
        local = list(own)
        for first in range(0, counts[layer], per_rank[layer]) if layer else [0]:
            yield from (renumbered(name, first) for name in local)
