"""Writing checkpoints in Megatron-LM's older format, for a layout of its own. See `megatron_legacy`."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import accumulate, product
from pathlib import Path
from typing import Any

from megatron_specialm.convert.iterations import new_iteration
from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.megatron_legacy import EXPERT, FILE, LAYER, rank_name, renumbered
from megatron_specialm.convert.torch_zip_writing import write_torch_zip

VERSION = 3.0  # since which rows of query_key_value are in groups


def write_megatron_legacy(
    path: Path,
    shards: Sequence[Mapping[str, LazyTensor]],
    *,
    settings: Mapping[str, Any],
    step: int | None,
    stage_layers: Sequence[int],
    expert_parallel: int = 1,
) -> Path:
    """Write an iteration and the tracker that names it.

    Args:
        path: a new or empty folder.
        shards: the weights of each tensor-parallel rank by name, as `MegatronLegacy.shards`: layers and experts are counted
            over all ranks. Embeddings go to the first stage, others without a layer to the last. Tied
            embeddings under pipeline parallelism are in twice, as `output_layer.weight` too.
        settings: the options of Megatron-LM; those of the layout are added.
        step: the iteration; None for `release`, weights without a training that goes on.
        stage_layers: the number of layers of each pipeline stage.

    Returns:
        The iteration's folder.
    """
    folder = new_iteration(path, step)
    stages = len(stage_layers)
    first_layers = [0, *accumulate(stage_layers)]
    sizes = {"tensor": len(shards), "pipeline": stages, "expert": expert_parallel}
    options = {**settings, **{f"{kind}_model_parallel_size": size for kind, size in sizes.items()}}
    for tensor, stage, expert in product(range(len(shards)), range(stages), range(expert_parallel)):
        own = _part(shards[tensor], range(*first_layers[stage : stage + 2]), stages, stage, expert, expert_parallel)
        place = folder / rank_name(tensor, stage, expert, stages=stages, experts=expert_parallel)
        place.mkdir()
        content = {
            "args": argparse.Namespace(**options),
            "checkpoint_version": VERSION,
            "iteration": step or 0,
            "model": own,
        }
        write_torch_zip(place / FILE, content)
    return folder


def _part(
    shard: Mapping[str, LazyTensor], layers: range, stages: int, stage: int, expert: int, expert_parallel: int
) -> dict[str, LazyTensor]:
    """The weights of a file, by its own numbers."""
    found: dict[str, LazyTensor] = {}
    experts = (
        max((int(match["number"]) + 1 for match in map(EXPERT.fullmatch, shard) if match), default=0) // expert_parallel
    )
    for name, tensor in shard.items():
        layer, one = LAYER.fullmatch(name), EXPERT.fullmatch(name)
        here = stage == (0 if "embedding" in name else stages - 1) if layer is None else int(layer["number"]) in layers
        if here and (one is None or int(one["number"]) // experts == expert):
            found[renumbered(EXPERT, renumbered(LAYER, name, -layers.start), -expert * experts)] = tensor
    return found
