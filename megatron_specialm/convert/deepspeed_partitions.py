"""ZeRO's partitions: each data-parallel rank owns a part of the flattened fp32 weights of a parameter group, and the same part
of Adam's moments.

Stages 1 and 2 partition the concatenation of a group's parameters; each rank's file says what it has of which parameter
(`param_slice_mappings`). Stage 3 partitions each parameter, in equal parts with padding at the end.

Experts are in groups of their own. With expert parallelism e, rank D has the experts of expert-parallel rank D % e, which its
file counts from 0, and their partitions are over the ranks D // e.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_specialm.convert.lazy import LazyTensor
from megatron_specialm.convert.stored import FileTensor, FlatTensor, Run

EXPERT = re.compile(r"(?P<layer>.+\.deepspeed_experts\.)(?P<expert>\d+)\.(?P<rest>.+)")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Partitions:
    """The optimizer files of all ranks, and the names and shapes per group that the model file has."""

    folder: Path
    ranks: Sequence[dict[str, Any]]
    param_shapes: Sequence[Mapping[str, Sequence[int]]]

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        stage = self.ranks[0]["zero_stage"]
        return stage if isinstance(stage, int) else stage.arguments[0]

    @property
    def _adam(self) -> Sequence[dict[str, Any]]:
        key = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        if any(not isinstance(rank[key], dict) for rank in self.ranks):
            raise ValueError("its optimizer is saved by elastic_checkpoint: save it without")
        return [rank[key] for rank in self.ranks]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's settings of each parameter group."""
        return self._adam[0]["param_groups"]

    @property
    def step(self) -> int | None:
        """How many updates Adam has made."""
        steps = [state["step"] for state in self._adam[0]["state"].values() if "step" in state]
        steps += [group["step"] for group in self.groups if "step" in group]
        return int(steps[0][()] if isinstance(steps[0], FileTensor) else steps[0]) if steps else None

    def flat(self, rank: int, group: int) -> dict[str, FileTensor]:
        """What a rank has of a group: flat tensors `fp32`, `exp_avg`, `exp_avg_sq`."""
        weights = self.ranks[rank]["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"][group]
        moments = self._adam[rank]["state"].get(group, {})
        return {"fp32": weights, **{name: moments[name] for name in _MOMENTS if name in moments}}

    def pieces(self) -> Iterator["_Piece"]:
        """What ranks have of which parameter, in the order of its elements."""
        return self._stage_3() if self.stage == 3 else self._stage_1_and_2()

    def _stage_1_and_2(self) -> Iterator["_Piece"]:
        for rank, content in enumerate(self.ranks):
            for group, fragments in enumerate(content["param_slice_mappings"]):
                expert_parallel = len(self.ranks) // content["partition_count"][group]
                for name, address in fragments.items():
                    place = address.fields
                    yield _Piece(
                        name, rank, group, place["start"], place["numel"], rank % expert_parallel, expert_parallel
                    )

    def _stage_3(self) -> Iterator["_Piece"]:
        for rank in range(len(self.ranks)):
            for group, shapes in enumerate(self.param_shapes):
                start = 0
                for name, shape in shapes.items():
                    count = -(-math.prod(shape) // len(self.ranks))
                    yield _Piece(name, rank, group, start, max(0, min(count, math.prod(shape) - rank * count)))
                    start += count


class _Piece(NamedTuple):
    """Elements of a parameter: these many of a rank's flat tensor of a group, from `start` on."""

    name: str
    rank: int
    group: int
    start: int
    elements: int
    expert_rank: int = 0
    expert_parallel: int = 1


def experts_of(names: Mapping[str, Any]) -> dict[str, int]:
    """How many experts each layer has, by the prefix of their names."""
    counts: dict[str, int] = {}
    for match in filter(None, map(EXPERT.fullmatch, names)):
        counts[match["layer"]] = max(counts.get(match["layer"], 0), int(match["expert"]) + 1)
    return counts


def partitioned_tensors(
    partitions: Partitions, shapes: Mapping[str, Sequence[int]], experts: Mapping[str, int]
) -> dict[str, LazyTensor]:
    """Whole tensors `fp32/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`.

    Args:
        shapes: of all parameters; experts' by their numbers over all ranks.
        experts: how many each layer has, by the prefix of their names.
    """
    runs: dict[str, list[Run]] = {}
    ends: dict[str, int] = {}
    for piece in partitions.pieces():
        name = _global_name(piece, experts)
        first = ends.get(name, 0)
        ends[name] = first + piece.elements
        for kind, flat in partitions.flat(piece.rank, piece.group).items():
            runs.setdefault(f"{kind}/{name}", []).append(Run(first, piece.elements, flat, piece.start))
    return {
        name: FlatTensor(name, tuple(shapes[name.split("/", 1)[1]]), own, partitions.folder)
        for name, own in runs.items()
    }


def _global_name(piece: _Piece, experts: Mapping[str, int]) -> str:
    match = EXPERT.fullmatch(piece.name)
    local = 0 if match is None else experts[match["layer"]] // piece.expert_parallel
    return renumbered(piece.name, piece.expert_rank * local)


def renumbered(name: str, first: int) -> str:
    """The name of an expert that is counted from `first`; any other name as it is."""
    match = EXPERT.fullmatch(name)
    return name if match is None else f"{match['layer']}{int(match['expert']) + first}.{match['rest']}"
