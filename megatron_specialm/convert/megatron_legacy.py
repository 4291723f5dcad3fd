"""Checkpoints in Megatron-LM's older format, `torch`: a file of torch.save for each model-parallel rank.

    latest_checkpointed_iteration.txt
    iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt      tensor-, pipeline- and expert-parallel rank

A file has `args`, `checkpoint_version`, `iteration` and `model`, or `model0`, `model1`, ... for the chunks of an interleaved
pipeline. Weights are this rank's part. Layers are counted from 0 within a chunk, experts within an expert-parallel rank. Here
both are counted over all ranks; only tensor parallelism is left, because which dimension it cuts depends on the model.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.iterations import iteration_folder
from megatron_specialm.convert.lazy import LazyTensor
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


@dataclass(frozen=True)
class MegatronLegacy:
    """A checkpoint of this format.

    `shards` has the weights of each tensor-parallel rank by name. `copies` are names that several pipeline stages have, of
    which the first one's is taken. `version` is Megatron-LM's `checkpoint_version`: the order of rows of query_key_value.
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
    tensor, stages, expert = (
        int(settings.get(f"{kind}_model_parallel_size", 1)) for kind in ("tensor", "pipeline", "expert")
    )
    ranks: list[dict[tuple[int, int], dict[str, Any]]] = [{} for _ in range(tensor)]
    for rank in product(range(tensor), range(stages), range(expert)):
        place = folder / rank_name(*rank, stages=stages, experts=expert)
        ranks[rank[0]][rank[1:]] = first if place.name == names[0] else _read(place)
    copies: list[str] = []
    shards = [_joined(files, stages, expert, copies) for files in ranks]
    for number, shard in enumerate(shards):
        if odd := sorted(set(shard) ^ set(shards[0])):
            raise CheckpointError(
                f"{folder}: tensor-parallel ranks 0 and {number} do not both have {odd[0]}: {COPY_AGAIN}"
            )
    return MegatronLegacy(
        folder=folder,
        shards=shards,
        copies=sorted(set(copies)),
        settings=settings,
        step=first.get("iteration"),
        version=float(first.get("checkpoint_version", 0)),
        has_optimizer="optimizer" in first or any(folder.glob("*/distrib_optim.pt")),
    )


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
    files: Mapping[tuple[int, int], dict[str, Any]], stages: int, experts: int, copies: list[str]
) -> dict[str, LazyTensor]:
    """The weights of a tensor-parallel rank, from its files by (pipeline stage, expert-parallel rank)."""
    found: dict[str, LazyTensor] = {}
    layers = 0  # before this chunk
    chunks = sorted((key for key in files[0, 0] if _CHUNK.fullmatch(key)), key=lambda key: int(key[5:] or 0))
    for chunk, stage in product(chunks, range(stages)):
        parts = [dict(_tensors(files[stage, rank][chunk])) for rank in range(experts)]
        own = {int(match["number"]) for match in map(LAYER.fullmatch, parts[0]) if match}
        numbers = [int(match["number"]) for part in parts for match in map(EXPERT.fullmatch, part) if match]
        local = max(numbers, default=-1) + 1  # of each rank
        for rank, part in enumerate(parts):
            for name, tensor in part.items():
                is_expert = EXPERT.fullmatch(name) is not None
                if rank and not is_expert:
                    continue  # every expert-parallel rank has the others
                name = renumbered(EXPERT, renumbered(LAYER, name, layers), rank * local)
                if name in found:
                    copies.append(name)
                found.setdefault(name, tensor)
        layers += len(own)
    return found


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
