"""Checkpoints of megatron-core's `dist_checkpointing` in its format `torch_dist`, which is PyTorch's DCP.

    iter_0000100/
        metadata.json       which format this is
        .metadata           a pickle: shape and type of each tensor, its chunks, and the bytes of a file that each chunk is
        __R_K.distcp        file K of rank R: the chunks, each as torch.save writes a tensor, one behind the other
        common.pt           what all ranks share, as torch.save writes it: settings (`args`), iteration, parameter groups

Tensors have their full shapes, without tensor or pipeline parallelism. The same layers can be one tensor with a first
dimension over layers, or a tensor per layer (`decoder.layers.7.`), by the metadata with which megatron-core saved.
"""

import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.files import read_json
from megatron_specialm.checkpoint.slices import StoredSlice
from megatron_specialm.convert.iterations import iteration_folder
from megatron_specialm.convert.lazy import Computed, LazyTensor
from megatron_specialm.convert.safe_pickle import COPY_AGAIN, decoding, inert, read_pickle
from megatron_specialm.convert.stored import BoxedTensor, FileTensor
from megatron_specialm.convert.torch_zip import TORCH, read_torch_zip, settings_of

FORMAT, METADATA, COMMON = "metadata.json", ".metadata", "common.pt"
MOMENTS = {f"optimizer.state.{theirs}.": f"{ours}/" for theirs, ours in
            {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "param": "fp32", "fp32_param": "fp32"}.items()}  # fmt: skip
COMMON_STATE = "common_state/shard_0_1"  # since megatron-core 0.19: what common.pt had, as one of the objects
_WHOLE = "nd_reformulated_orig_global_shape"
_CHAINED = re.compile(
    r"chained_\d+\.(?=optimizer\.)"
)  # one optimizer of several: for weights that are summed otherwise
_ALLOWED = {
    **TORCH,
    **inert(
        "torch.distributed.checkpoint.*", "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan", "pathlib.PosixPath",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TorchDist:
    """A checkpoint of this format.

    `tensors` are the weights, `optimizer` has `exp_avg/NAME`, `exp_avg_sq/NAME` and, in mixed precision, the main copy
    `fp32/NAME` of weight NAME. `others` are tensors of the optimizer in a form that is not read, and `objects` are no tensors
    (`_extra_state`, random states).
    """

    folder: Path
    tensors: Mapping[str, LazyTensor]
    optimizer: Mapping[str, LazyTensor]
    others: Sequence[str]
    objects: Sequence[str]
    common: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The options that Megatron-LM was started with; empty where it has not saved them."""
        return settings_of(self.common.get("args"))

    @property
    def step(self) -> int | None:
        """The iteration."""
        return self.common.get("iteration")

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's settings of each parameter group."""
        return self._adam.get("param_groups", [])

    @property
    def optimizer_step(self) -> int | None:
        """How many updates Adam has made."""
        found = self._adam.get("state", {}).get("common_step")
        for group in self.groups:
            found = group.get("step", found)
        return int(found[()] if isinstance(found, FileTensor) else found) if found is not None else None

    @property
    def _adam(self) -> dict[str, Any]:
        state = self.common.get("optimizer") or {}
        state = state.get(0, state)  # the first of chained optimizers
        return state.get("optimizer", state)  # of mixed precision, or the distributed optimizer


def recognize(path: Path) -> bool:
    """Whether a folder, or the last iteration in it, is of this format."""
    folder = iteration_folder(path)
    return any((folder / name).is_file() for name in (METADATA, FORMAT)) or any(folder.glob("*.distcp"))


def open_torch_dist(path: Path) -> TorchDist:
    """Open a checkpoint. Its metadata is read, its tensors are not.

    Args:
        path: the folder of an iteration, or of iterations, of which it is the last.

    Raises:
        CheckpointError: it is damaged or incomplete, of another format, or its pickles ask for code.
    """
    folder = iteration_folder(path)
    with decoding(folder / FORMAT, "valid JSON"):
        backend = read_json(folder / FORMAT, dict[str, Any]).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(
            f"{folder / FORMAT}: the format is {backend!r}, and only 'torch_dist' is known: save it so"
        )
    with decoding(folder / METADATA, "the metadata of torch's distributed checkpoints"):
        fields = read_pickle(folder / METADATA, _ALLOWED).fields
        described, stored = fields["state_dict_metadata"], fields["storage_data"]
        places: dict[str, dict[tuple[int, ...], _Place]] = {}
        for index, info in stored.items():
            offset = index.fields.get("offset")
            places.setdefault(index.fields["fqn"], {})[offset or ()] = _place(folder, **info.fields)
        _refuse_others(folder, {info.fields["relative_path"] for info in stored.values()})
        whole = {name: own.get(_WHOLE) for name, own in (fields.get("mcore_data") or {}).items()}
        tensors = {
            _CHAINED.sub("", name): _tensor(name, folder, entry.fields, places.get(name, {}), whole.get(name))
            for name, entry in described.items()
            if entry.name.endswith(".TensorStorageMetadata")
        }
        common = _common(folder, places.get(COMMON_STATE, {}).get(()))
    moments = {
        ours + name.removeprefix(theirs): tensor
        for name, tensor in tensors.items()
        for theirs, ours in MOMENTS.items()
        if name.startswith(theirs)
    }
    others = [name for name in tensors if name.startswith("optimizer.") and not name.startswith(tuple(MOMENTS))]
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    objects = [name for name, entry in described.items() if not entry.name.endswith(".TensorStorageMetadata")]
    return TorchDist(folder, weights, moments, others, [name for name in objects if name != COMMON_STATE], common)


def _refuse_others(folder: Path, named: Collection[str]) -> None:
    """Refuse files of tensors that the metadata does not name: every tensor is used."""
    for path in sorted(folder.glob("*.distcp")):
        if path.name not in named and path.stat().st_size:
            raise CheckpointError(
                f"{path}: {METADATA} does not name it: move it away if another attempt to save has left it there"
            )


def _common(folder: Path, place: "_Place | None") -> dict[str, Any]:
    if (folder / COMMON).is_file():
        return read_torch_zip(folder / COMMON, inert("megatron.*"))
    if place is None:
        return {}
    return read_torch_zip(place.path, inert("megatron.*"), start=place.start, length=place.length)[0]


class _Place(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    length: int


def _place(folder: Path, relative_path: str, offset: int, length: int, transform_descriptors: Any = None) -> _Place:
    if PurePosixPath(relative_path).name != relative_path:
        raise CheckpointError(
            f"{folder / METADATA}: names the file {relative_path!r}, outside of its folder: do not trust it"
        )
    path = folder / relative_path
    if transform_descriptors:
        raise CheckpointError(f"{folder / METADATA}: says that {path.name} is compressed: save it without")
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing, though {METADATA} names it: {COPY_AGAIN}")
    if offset < 0 or length < 0 or offset + length > (size := path.stat().st_size):
        raise CheckpointError(
            f"{path}: has {size} bytes, and {METADATA} names {offset} to {offset + length}: {COPY_AGAIN}"
        )
    return _Place(path, offset, length)


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor in a file, whose header is read when the box is."""

    place: _Place
    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def _content(self) -> FileTensor:
        path, start, length = self.place
        content = read_torch_zip(path, start=start, length=length)
        if not isinstance(content, FileTensor) or (content.shape, content.dtype) != (self.shape, self.dtype):
            raise CheckpointError(
                f"{path}: at byte {start} {METADATA} says a tensor of shape {self.shape} and type {self.dtype}, and there is "
                f"{content}: {COPY_AGAIN}"
            )
        return content

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        return self._content[index]


def _tensor(
    name: str,
    folder: Path,
    described: dict[str, Any],
    places: Mapping[tuple[int, ...], _Place],
    whole: tuple[int, ...] | None,
) -> LazyTensor:
    """A tensor of the metadata. `whole`: its shape, where it is stored by parts that were each flattened."""
    shape = described["size"]
    dtype = described["properties"].state[0]  # torch's __getstate__ lists type, layout, gradient, memory format, pinned
    boxes = {}
    for chunk in described["chunks"]:
        starts, sizes = chunk.fields["offsets"], chunk.fields["sizes"]
        stops = tuple(map(operator.add, starts, sizes))
        if any(
            first < 0 or stop < first or stop > size for first, stop, size in zip(starts, stops, shape, strict=True)
        ):
            raise CheckpointError(f"{folder / METADATA}: {name}: a chunk leaves the shape {shape}: {COPY_AGAIN}")
        if starts not in places:
            raise CheckpointError(f"{folder / METADATA}: {name}: its chunk at {starts} is in no file: {COPY_AGAIN}")
        boxes[StoredSlice(places[starts].path, name, starts, stops, shape)] = _Chunk(places[starts], sizes, dtype)
    stored = BoxedTensor(name, boxes)
    return stored if whole is None else _unflattened(stored, tuple(whole))


def _unflattened(stored: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """A tensor of the distributed optimizer of megatron-core before 0.14: stored as the number of parts that each dimension is
    cut into, then a part's elements."""
    counts = tuple(stored.shape[:-1])
    sizes = list(zip(shape, counts, strict=True))
    if any(size % count for size, count in sizes) or math.prod(stored.shape) != math.prod(shape):
        raise ValueError(f"parts of shape {tuple(stored.shape)} do not make a tensor of shape {shape}")
    part = tuple(size // count for size, count in sizes)
    order = [axis for pair in zip(range(len(shape)), range(len(shape), 2 * len(shape)), strict=True) for axis in pair]
    return Computed(shape, stored.dtype, lambda: stored[()].view(*counts, *part).permute(order).reshape(shape))
