"""Writing checkpoints of megatron-core's `dist_checkpointing`, which any of its layouts can load. See `torch_dist`."""

import math
import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_specialm.base.files import named, write_json
from megatron_specialm.convert.iterations import new_iteration
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.torch_dist import COMMON, FORMAT, METADATA, MOMENTS
from megatron_specialm.convert.torch_zip_writing import slices, write_torch_zip

Stored = dict[MetadataIndex, _StorageInfo]


def write_torch_dist(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    step: int | None,
    common: Mapping[str, Any],
    optimizer: Mapping[str, LazyTensor] | None = None,
    objects: Iterable[str] = (),
    files: int = 2,
) -> Path:
    """Write an iteration and the tracker that names it. Each file is written by a thread, slice by slice.

    Args:
        path: a new or empty folder.
        tensors: weights by megatron-core's names, with their full shapes.
        step: the iteration; None for `release`, weights without a training that goes on.
        common: what common.pt holds: `args` (an `argparse.Namespace`), `iteration`, `checkpoint_version`, ...
        optimizer: `exp_avg/NAME`, `exp_avg_sq/NAME` and `fp32/NAME` of weights, as `TorchDist.optimizer`.
        objects: objects that the model asks for, as `decoder.layers.mlp.linear_fc1._extra_state/shard_0_4`: written as None.

    Returns:
        The iteration's folder.
    """
    folder = new_iteration(path, step)
    theirs = {ours: prefix for prefix, ours in reversed(MOMENTS.items())}
    everything = dict(tensors)
    for name, tensor in (optimizer or {}).items():
        kind, _, weight = name.partition("/")
        everything[f"{theirs[kind + '/']}{weight}"] = tensor
    bins: list[dict[str, LazyTensor | None]] = [{} for _ in range(files)]
    for number, name in enumerate(sorted(everything, key=lambda name: -_bytes(everything[name]))):
        bins[number % files][name] = everything[name]
    bins[0].update(dict.fromkeys(objects))
    with ThreadPoolExecutor(files) as pool:
        parts = list(pool.map(_write_file, [folder / f"__0_{number}.distcp" for number in range(files)], bins))
    stored = {index: info for part in parts for index, info in part.items()}
    offsets: dict[str, list[Any]] = {}
    for index in stored:
        offsets.setdefault(index.fqn, []).append(index.offset)
    described: dict[str, Any] = {name: _described(tensor, offsets[name]) for name, tensor in everything.items()}
    described |= {name: BytesStorageMetadata() for name in objects}
    metadata = Metadata(described, storage_data=stored, storage_meta=StorageMeta(), version="1.0.0")
    with named(folder / METADATA), (folder / METADATA).open("xb") as file:
        pickle.dump(metadata, file)
    write_torch_zip(folder / COMMON, dict(common))
    write_json(
        folder / FORMAT, {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    )
    return folder


def _bytes(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _write_file(path: Path, contents: Mapping[str, LazyTensor | None]) -> Stored:
    """Write tensors, or None for an object, one behind the other; where each part is."""
    stored: Stored = {}
    with named(path), path.open("xb") as file:
        for name, tensor in contents.items():
            row = 0
            for part in [None] if tensor is None else slices(tensor):
                start = file.tell()
                torch.save([None] if part is None else _own(part), file)
                offset = None if part is None else (row, *(0 for _ in part.shape[1:])) if part.shape else ()
                stored[MetadataIndex(name, offset)] = _StorageInfo(path.name, start, file.tell() - start)
                row += 0 if part is None or not part.shape else len(part)
    return stored


def _own(part: torch.Tensor) -> torch.Tensor:
    """A part with a storage of its own: torch.save writes the whole storage of a view."""
    part = part.contiguous()
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


def _described(tensor: LazyTensor, offsets: list[Any]) -> TensorStorageMetadata:
    """What .metadata says of a tensor whose parts begin at these offsets, in order of its rows."""
    ends = [offset[0] for offset in offsets[1:]] + list(tensor.shape[:1])
    sizes = [[end - offset[0], *tensor.shape[1:]] for offset, end in zip(offsets, ends, strict=False)] if ends else [[]]
    chunks = [ChunkStorageMetadata(offset, torch.Size(size)) for offset, size in zip(offsets, sizes, strict=True)]
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), chunks)
