"""Trained models that are several, opened as checkpoints of one ordinary model, which `write_target` writes in any format.

RUN/STAGE/generic   a projected network, or an MoE that routes by cluster: an expert, or a mixture of a network's experts
RUN/STAGE           the experts of a mixture (`data: cluster`): checkpoints of their own in c0, c1, ...
RUN/STAGE/KEY       a training with LoRA: its base with the adapters merged
"""

import re
from pathlib import Path

import torch

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert import canonical_folder
from megatron_specialm.convert.canonical_folder import expert_count, open_experts
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.run import Conversion, convertible, new_folder, write_target
from megatron_specialm.convert.source import Source
from megatron_specialm.data.clusters import read_histogram
from megatron_specialm.graph.lineage import cluster_of, expert_key
from megatron_specialm.model.merge import one_hot


def open_adapted(path: Path) -> Source:
    """A training with LoRA, as the ordinary model that it computes.

    Raises:
        CheckpointError: it has no adapters.
    """
    source = open_source(path)
    if not any(".lora_" in name for name in source.stored):
        raise CheckpointError(
            f"{source.path}: has no adapters (LoRA) to merge: `specialm convert` converts it as it is"
        )
    return convertible(source)


def open_expert(path: Path, expert: int) -> Source:
    """One expert, by the number of its cluster.

    Raises:
        CheckpointError: the folder is of an ordinary model, or there is no such expert.
    """
    if not (folders := _mixture(path)):
        return convertible(open_experts(path, lambda count: one_hot(expert, experts=count)))
    if (key := expert_key(expert)) not in folders:
        raise CheckpointError(f"{path}: expert {expert} does not exist: there are {', '.join(folders)}")
    return convertible(canonical_folder.open_folder(folders[key]))


def open_histogram(path: Path, assignment: Path) -> Source:
    """The experts of a projected network, averaged by a set's cluster histogram, as `select` does `by: histogram`.

    Args:
        assignment: RUN/STAGE/SET of an `assign` stage.
    """
    if _mixture(path):
        raise CheckpointError(f"{path}: a mixture of checkpoints has no average: name one (--expert)")
    averaged = open_experts(path, lambda count: torch.from_numpy(read_histogram(assignment, k=count)).float())
    return convertible(averaged)


def convert_experts(path: Path, target: Path, *, to: str, dtype: torch.dtype | None = None) -> dict[str, Conversion]:
    """Write every expert, as TARGET/c0, TARGET/c1, ...: all or none.

    Returns:
        What was converted, by key.
    """
    keys = list(_mixture(path)) or [expert_key(expert) for expert in range(expert_count(path))]
    with new_folder(target) as temporary:
        return {
            key: write_target(open_expert(path, cluster_of(key)), temporary / key, to=to, dtype=dtype) for key in keys
        }


def _mixture(path: Path) -> dict[str, Path]:
    """The folders of a mixture's experts by key, in the order of clusters; none of another model."""
    found = [each for each in path.glob("c*") if re.fullmatch(r"c\d+", each.name) and canonical_folder.recognize(each)]
    return {each.name: each for each in sorted(found, key=lambda each: cluster_of(each.name))}
