"""Checkpoints in Megatron-LM's older format, `torch`: a file of torch.save for each model-parallel rank.

    latest_checkpointed_iteration.txt
    iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt      tensor-, pipeline- and expert-parallel rank

A file has `args`, `checkpoint_version`, `iteration` and `model`, or `model0`, `model1`, ... for the chunks of an interleaved
pipeline. Weights are this rank's part. Layers are counted from 0 within a chunk, experts within an expert-parallel rank. Here
both are counted over all ranks; only tensor parallelism is left, because which dimension it cuts depends on the model.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.iterations import iteration_folder
from megatron_specialm.convert.lazy import LazyTensor, agreed, equal_bits
from megatron_specialm.convert.safe_pickle import COPY_AGAIN, decoding, inert
from megatron_specialm.convert.stored import FileTensor
from megatron_specialm.convert.torch_zip import read_torch_zip, settings_of

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_\d\d(_\d\d\d){0,2}")
_CHUNK = re.compile(r"model\d*")
LAYER = re.compile(r"(?P<before>(.*\.)?layers\.)(?P<number>\d+)(?P<after>\..+)")
EXPERT = re.compile(
    r"(?P<before>.*\.experts\.(local_experts\.|linear_fc[12]\.(weight|bias)))(?P<number>\d+)(?P<after>.*)"
)
_ALLOWED = inert("megatron.*", "_io.BytesIO")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MegatronLegacy:
    """A checkpoint of this format.

    `shards` has the weights of each tensor-parallel rank by name. `copies` are names that several pipeline stages have; these
    are compared when they are read, as are those that every expert-parallel rank has. `version` is Megatron-LM's
    `checkpoint_version`: the order of rows of query_key_value.
    `has_optimizer`: an optimizer's state is in the files, which is not read.
    """

    folder: Path
    shards: Sequence[Mapping[str, LazyTensor]]
    copies: Sequence[str]
    settings: Mapping[str, Any]
    step: int | None
    version: float
    has_optimizer: bool

    @property
    def by_rank(self) -> dict[str, LazyTensor]:
        """The weights of all tensor-parallel ranks, as `0/NAME`, `1/NAME`, ..."""
        return {f"{rank}/{name}": tensor for rank, own in enumerate(self.shards) for name, tensor in own.items()}


def recognize(path: Path) -> bool:
    """Whether a folder, or the last iteration in it, is of this format."""
    folder = iteration_folder(path)
    return folder.is_dir() and any(_RANK.fullmatch(one.name) and one.is_dir() for one in folder.iterdir())


def open_megatron_legacy(path: Path) -> MegatronLegacy:
    """Open a checkpoint. Headers are read, tensors are not.

    Args:
        path: the folder of an iteration, or of iterations, of which it is the last.

    Raises:
        CheckpointError: a rank's file is missing or damaged, ranks do not fit together, or a pickle asks for code.
    """
    folder = iteration_folder(path)
    names = sorted(one.name for one in folder.iterdir() if _RANK.fullmatch(one.name))
    if not names:
        raise CheckpointError(f"{folder}: has no mp_rank_00: {COPY_AGAIN}")
    first = _read(folder / names[0])
    settings = settings_of(first.get("args"))
    sizes = Sizes(*(int(settings.get(f"{kind}_model_parallel_size", 1)) for kind in ("tensor", "pipeline", "expert")))
    ranks: list[dict[tuple[int, int], dict[str, Any]]] = [{} for _ in range(sizes.tensor)]
    for rank in sizes.ranks:
        place = folder / rank_name(*rank, stages=sizes.stages, experts=sizes.experts)
        ranks[rank[0]][rank[1:]] = first if place.name == names[0] else _read(place)
    copies: list[str] = []
    _refuse_others(folder, names, sizes)
    shards = [_joined(folder, rank, files, sizes, copies) for rank, files in enumerate(ranks)]
    for number, shard in enumerate(shards):
        if odd := sorted(set(shard) ^ set(shards[0])):
            raise CheckpointError(
                f"{folder}: tensor-parallel ranks 0 and {number} do not both have {odd[0]}: {COPY_AGAIN}"
            )
    if sizes.experts > 1:
        _warn_of_equal_experts(folder, shards[0])
    return MegatronLegacy(
        folder=folder,
        shards=shards,
        copies=sorted(set(copies)),
        settings=settings,
        step=first.get("iteration"),
        version=float(first.get("checkpoint_version", 0)),
        has_optimizer="optimizer" in first or any(folder.glob("*/distrib_optim.pt")),
    )


class Sizes(NamedTuple):
    """Into how many parts each kind of parallelism has cut the model."""

    tensor: int
    stages: int
    experts: int

    @property
    def ranks(self) -> Iterator[tuple[int, int, int]]:
        """Tensor-, pipeline- and expert-parallel rank of each file."""
        return product(range(self.tensor), range(self.stages), range(self.experts))


def _refuse_others(folder: Path, names: Sequence[str], sizes: Sizes) -> None:
    """Refuse files of ranks that the settings do not have: every tensor is used."""
    expected = {rank_name(*rank, stages=sizes.stages, experts=sizes.experts) for rank in sizes.ranks}
    if others := [name for name in names if name not in expected]:
        raise CheckpointError(
            f"{folder / others[0]}: no rank of tensor parallelism {sizes.tensor}, pipeline parallelism {sizes.stages} and "
            f"expert parallelism {sizes.experts}, which the settings say: move it away if it is of another checkpoint"
        )


def _warn_of_equal_experts(folder: Path, shard: Mapping[str, LazyTensor]) -> None:
    """Log which experts of a layer have equal weights: the file of a rank may be a copy of another's."""
    known: dict[tuple[str, bytes], str] = {}
    pairs = []
    for name, tensor in shard.items():
        match = EXPERT.fullmatch(name)
        if match is None or len(tensor.shape) < 2:
            continue
        row = tensor[slice(0, 1),].contiguous().view(torch.uint8).numpy().tobytes()
        other = known.setdefault((match["before"] + match["after"], row), name)
        if other != name and equal_bits(tensor[()], shard[other][()]):
            pairs.append((other, name))
    if pairs:
        logger.warning(
            "%s: %s and %s are equal (%d such pairs): if the experts were not copied on purpose (upcycling), a rank's file "
            "is a copy of another's",
            folder, *pairs[0], len(pairs),
        )  # fmt: skip


def rank_name(tensor: int, stage: int, expert: int, *, stages: int, experts: int) -> str:
    name = f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if stages > 1 else "")
    return name + (f"_{expert:03d}" if experts > 1 else "")


def _read(place: Path) -> dict[str, Any]:
    with decoding(place / FILE, "a checkpoint of Megatron-LM"):
        content = read_torch_zip(place / FILE, _ALLOWED)
        if not isinstance(content, dict) or not any(_CHUNK.fullmatch(key) for key in content):
            raise ValueError("it has no model")
        return content


def _joined(
    folder: Path,
    tensor_rank: int,
    files: Mapping[tuple[int, int], dict[str, Any]],
    sizes: Sizes,
    copies: list[str],
) -> dict[str, LazyTensor]:
    """The weights of a tensor-parallel rank, from its files by (pipeline stage, expert-parallel rank)."""
    found: dict[str, dict[str, LazyTensor]] = {}  # of each name, the tensor in each file
    stages, experts = sizes.stages, sizes.experts
    layers = 0  # before this chunk
    chunks = sorted((key for key in files[0, 0] if _CHUNK.fullmatch(key)), key=lambda key: int(key[5:] or 0))
    for chunk, stage in product(chunks, range(stages)):
        parts = [dict(_tensors(files[stage, rank][chunk])) for rank in range(experts)]
        own = {int(match["number"]) for match in map(LAYER.fullmatch, parts[0]) if match}
        numbers = [int(match["number"]) for part in parts for match in map(EXPERT.fullmatch, part) if match]
        local = max(numbers, default=-1) + 1  # of each rank
        for rank, part in enumerate(parts):
            place = f"{rank_name(tensor_rank, stage, rank, stages=stages, experts=experts)} ({chunk})"
            for theirs, tensor in part.items():
                name = renumbered(EXPERT, renumbered(LAYER, theirs, layers), rank * local)
                if name in found and not rank:
                    copies.append(name)
                found.setdefault(name, {})[place] = tensor
        layers += len(own)
    return {name: agreed(own, name, folder) for name, own in found.items()}


def renumbered(pattern: re.Pattern[str], name: str, offset: int) -> str:
    match = pattern.fullmatch(name)
    return name if match is None else f"{match['before']}{int(match['number']) + offset}{match['after']}"


def _tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, LazyTensor]]:
    """All tensors in nested dictionaries, by their keys joined with dots."""
    if isinstance(content, FileTensor) and not prefix.endswith("._extra_state"):
        yield prefix, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
