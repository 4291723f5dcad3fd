"""Writing checkpoints that DeepSpeed goes on from: a ZeRO-1 folder for a number of data-parallel ranks, or a universal
checkpoint for any. See `deepspeed_folder` and `deepspeed_partitions`.

ZeRO-1 pads the concatenated parameters of a group to a multiple of twice the number of ranks and gives each rank an equal part.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import write_text
from megatron_specialm.convert.deepspeed_folder import ParameterGroup
from megatron_specialm.convert.deepspeed_partitions import EXPERT, experts_of
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.safe_pickle import Inert
from megatron_specialm.convert.torch_zip_writing import write_torch_zip

FORMAT_VERSION = "0.19.6"  # of DeepSpeed, whose format this is
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class DeepSpeedState:
    """What a checkpoint of DeepSpeed holds.

    Args:
        tensors: weights and buffers by their names in the module.
        groups: the optimizer's parameter groups, in the module's order, by which DeepSpeed finds weights; what is in none is a
            buffer. Experts are in groups of their own, counted over all ranks.
        optimizer: `exp_avg/NAME`, `exp_avg_sq/NAME`, zeros where they are missing; `fp32/NAME`, the weight where it is missing.
        optimizer_step: how many updates Adam has made.
        step: of the training.
        dtype: of the module's weights; the optimizer's are in fp32.
        shared: for a tied weight that is in no group, the one that it equals.
        settings: DeepSpeed's config.
    """

    tensors: Mapping[str, LazyTensor]
    groups: Sequence[ParameterGroup]
    optimizer: Mapping[str, LazyTensor]
    optimizer_step: int
    step: int
    dtype: torch.dtype = torch.float32
    shared: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def fp32(self, kind: str, name: str) -> LazyTensor:
        """The weight (kind `fp32`) or a moment in fp32."""
        weight = self.tensors[name]
        missing = weight if kind == "fp32" else _Zeros(tuple(weight.shape))
        return _Cast(self.optimizer.get(f"{kind}/{name}", missing), torch.float32)


def write_zero1(path: Path, state: DeepSpeedState, *, data_parallel: int, expert_parallel: int = 1) -> Path:
    """Write a ZeRO-1 checkpoint and `latest`.

    Args:
        path: a new or empty folder.
        expert_parallel: over how many of the data-parallel ranks a layer's experts are dealt out.

    Returns:
        The step's folder.

    Raises:
        CheckpointError: expert parallelism does not divide the ranks or a layer's experts.
    """
    check_expert_parallel(expert_parallel, data_parallel, experts_of(state.tensors).values())
    folder = path / f"global_step{state.step}"
    folder.mkdir(parents=True)
    _write_module(folder, state, data_parallel, expert_parallel)
    prefix = "bf16_" if state.dtype == torch.bfloat16 else ""
    for rank in range(data_parallel):
        content = {
            "optimizer_state_dict": _partition(state, rank, data_parallel, expert_parallel),
            "ds_version": FORMAT_VERSION,
        }
        write_torch_zip(
            folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            {**content, "ds_config": dict(state.settings)},
        )
    write_text(path / "latest", folder.name)
    return folder


def check_expert_parallel(expert_parallel: int, data_parallel: int, experts: Iterable[int]) -> None:
    """Refuse a degree that does not divide the ranks or a layer's experts.

    Raises:
        CheckpointError: naming the number.
    """
    if odd := next((size for size in (data_parallel, *experts) if size % expert_parallel), None):
        raise CheckpointError(
            f"expert parallelism {expert_parallel} does not divide {odd} ranks or experts: choose an --expert-parallel that "
            "divides --data-parallel and each layer's experts"
        )


def write_universal(path: Path, state: DeepSpeedState) -> Path:
    """Write a universal checkpoint, `latest` and `latest_universal`; see `write_zero1`.

    Raises:
        CheckpointError: the model has experts.
    """
    if experts_of(state.tensors):
        raise CheckpointError(f"{path}: DeepSpeed has no universal checkpoints of models with experts: write ZeRO-1")
    folder = path / f"global_step{state.step}"
    (folder / "zero").mkdir(parents=True)
    _write_module(folder, state, 1, 1)
    for name in (name for group in state.groups for name in group.names):
        (folder / "zero" / name).mkdir()
        for kind in ("fp32", *_MOMENTS):
            write_torch_zip(folder / "zero" / name / f"{kind}.pt", {"param": state.fp32(kind, name), "cat_dim": 0})
        write_torch_zip(folder / "zero" / name / "step.pt", torch.tensor(float(state.optimizer_step)))
    common = {"zero_stage": _stage(), "ds_version": FORMAT_VERSION, "param_groups": _settings(state)}
    write_torch_zip(folder / "zero" / "optimizer_state.pt", common)
    for name in ("latest", "latest_universal"):
        write_text(path / name, folder.name)
    return folder


def _write_module(folder: Path, state: DeepSpeedState, data_parallel: int, expert_parallel: int) -> None:
    """Write the module's weights, and each expert's to a file of its own."""
    trained = {name for group in state.groups for name in group.names}
    weights = {name: _Cast(one, state.dtype) if name in trained else one for name, one in state.tensors.items()}
    files: dict[tuple[str, int], dict[str, LazyTensor]] = {}
    for name in [name for group in state.groups for name in group.names]:
        if match := EXPERT.fullmatch(name):
            files.setdefault((match["layer"], int(match["expert"])), {})[name] = weights.pop(name)
    layers = list(dict.fromkeys(layer for layer, _ in files))
    for (layer, expert), own in files.items():
        write_torch_zip(folder / f"layer_{layers.index(layer)}_expert_{expert}_mp_rank_00_model_states.pt", own)
    content = {
        "module": weights | {name: weights[other] for name, other in state.shared.items()},
        "buffer_names": [name for name in weights if name not in trained],
        "optimizer": None,
        "param_shapes": [
            OrderedDict(
                (local, torch.Size(state.tensors[name].shape))
                for name, local in _of_rank(state, group, 0, expert_parallel)
            )
            for group in state.groups
        ],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": dict(state.shared),
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": state.step,
        "dp_world_size": data_parallel,
        "mp_world_size": 1,
        "ds_config": dict(state.settings),
        "ds_version": FORMAT_VERSION,
        **({"num_experts": list(experts_of(state.tensors).values())} if layers else {}),
    }
    write_torch_zip(folder / "mp_rank_00_model_states.pt", content)


def _of_rank(
    state: DeepSpeedState, group: ParameterGroup, expert_rank: int, expert_parallel: int
) -> list[tuple[str, str]]:
    """The weights of a group that an expert-parallel rank has: their names, and the names that it gives them."""
    counts = experts_of(state.tensors)
    found = []
    for name in group.names:
        if (match := EXPERT.fullmatch(name)) is None:
            found.append((name, name))
        else:
            rank, local = divmod(int(match["expert"]), counts[match["layer"]] // expert_parallel)
            if rank == expert_rank:
                found.append((name, f"{match['layer']}{local}.{match['rest']}"))
    return found


def _partition(state: DeepSpeedState, rank: int, data_parallel: int, expert_parallel: int) -> dict[str, Any]:
    """A rank's `optimizer_state_dict`."""
    weights, mappings, paddings, counts = [], [], [], []
    moments: dict[int, dict[str, Any]] = {}
    for number, group in enumerate(state.groups):
        names = _of_rank(state, group, rank % expert_parallel, expert_parallel)
        own_parallel = expert_parallel if any(map(EXPERT.fullmatch, group.names)) else 1
        ranks, place = data_parallel // own_parallel, rank // own_parallel  # that share these weights
        sizes = [math.prod(state.tensors[name].shape) for name, _ in names]
        part = -(-sum(sizes) // (2 * ranks)) * 2
        flat = {kind: _Flat([state.fp32(kind, name) for name, _ in names]) for kind in ("fp32", *_MOMENTS)}
        start, stop = place * part, (place + 1) * part
        weights.append(_Part(flat["fp32"], start, min(stop, sum(sizes))))
        moments[number] = {kind: _Part(flat[kind], start, stop) for kind in _MOMENTS}
        moments[number]["step"] = torch.tensor(float(state.optimizer_step))
        paddings.append(max(0, min(part, stop - sum(sizes))))
        own: OrderedDict[str, Inert] = OrderedDict()
        for (_, local), size, end in zip(names, sizes, accumulate(sizes), strict=True):
            first, last = max(start, end - size), min(stop, end)
            if first < last:
                own[local] = Inert("deepspeed.utils.tensor_fragment.fragment_address", last - first, first - start)
                own[local].state = {"numel": last - first, "start": first - start}
        mappings.append(own)
        counts.append(ranks)
    return {
        "base_optimizer_state": {"state": moments, "param_groups": _settings(state)},
        "single_partition_of_fp32_groups": weights,
        "zero_stage": _stage(),
        "group_paddings": paddings,
        "param_alignment_paddings": [[0] * len(_of_rank(state, group, 0, expert_parallel)) for group in state.groups],
        "partition_count": counts,
        "param_slice_mappings": mappings,
        "ds_version": FORMAT_VERSION,
    }


def _stage() -> Inert:
    return Inert("deepspeed.runtime.zero.config.ZeroStageEnum", 1)


def _settings(state: DeepSpeedState) -> list[dict[str, Any]]:
    return [{**group.settings, "params": [number]} for number, group in enumerate(state.groups)]


@dataclass(frozen=True)
class _Cast:
    """A tensor in another type."""

    tensor: LazyTensor
    dtype: torch.dtype

    @property
    def shape(self) -> Sequence[int]:
        return self.tensor.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index].to(self.dtype)


@dataclass(frozen=True)
class _Zeros:
    """A tensor of zeros."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.zeros((), dtype=self.dtype).expand(self.shape)[index]


@dataclass(frozen=True)
class _Flat:
    """The concatenation of flattened tensors, with zeros behind."""

    tensors: Sequence[LazyTensor]

    def between(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Elements from `start` to `stop`, in parts. Of each tensor the rows that have them are read."""
        end = 0
        for tensor in self.tensors:
            size = math.prod(tensor.shape)
            first, last = max(start - end, 0), min(stop - end, size)
            if first < last:
                row = math.prod(tensor.shape[1:])
                rows = slice(first // row, -(-last // row))
                flat = tensor[rows,].reshape(-1) if tensor.shape else tensor[()].reshape(-1)
                yield flat[first - rows.start * row : last - rows.start * row]
            end += size
        yield torch.zeros(max(0, stop - max(start, end)))


class _Part:
    """A range of a concatenation."""

    dtype = torch.float32

    def __init__(self, whole: _Flat, start: int, stop: int) -> None:
        self._whole, self._start = whole, start
        self.shape = (max(0, stop - start),)

    def __getitem__(self, index: Any) -> torch.Tensor:
        first, last, _ = index[0].indices(self.shape[0])
        return torch.cat(list(self._whole.between(self._start + first, self._start + last)))
