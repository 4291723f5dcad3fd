"""Routed experts of the DeepSpeed engine: DeepSpeed-MoE's layer with our router and Megatron-Core's MLPs.

Each process fills, for every expert, as many slots as the busiest expert of its expert-parallel group has tokens. The slots go
to the processes with the experts and back by all-to-all. Under tensor parallelism the ranks, which have the same tokens, each
send a part of the slots; ranks that split an expert then gather the parts.

Legend: T positions, B sequences, N = T * B tokens of this process, E experts, K experts per token, H hidden size.
"""

import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_specialm.engine.deepspeed.package import deepspeed_module
from megatron_specialm.model.moe import RoutedSettings, feed_forward
from megatron_specialm.model.router import ClusterRouter, Router, router_of

_EXPERT = re.compile(r"moe\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.network\.(.*)")
_GATE = "moe.deepspeed_moe.gate."


class DeepSpeedExperts(nn.Module):
    """See `RoutedExperts`."""

    def __init__(self, settings: RoutedSettings) -> None:
        super().__init__()
        group = parallel_state.get_expert_model_parallel_group()
        self._first = group.rank() * (settings.experts // group.size())
        self.moe = deepspeed_module("deepspeed.moe.layer").MoE(
            settings.config.hidden_size, _Expert(settings), num_experts=settings.experts, ep_size=group.size()
        )
        self.moe.deepspeed_moe.gate = _Gate(settings)
        _share_groups(self.moe.expert_group_name)
        self.moe.set_deepspeed_parallelism()
        self._in_fp32 = {parameter: parameter.data for parameter in self.router.parameters()}

    @property
    def router(self) -> Router | ClusterRouter:
        """See `RoutedExperts`."""
        router: Router | ClusterRouter = self.moe.deepspeed_moe.gate.router
        return router

    def forward(self, hidden_TBH: torch.Tensor, routing: torch.Tensor | None = None) -> torch.Tensor:
        """See `RoutedExperts`."""
        output_TBH, *_ = self.moe(hidden_TBH, None if routing is None else routing.transpose(0, 1))
        return output_TBH  # type: ignore[no-any-return]

    def set_deepspeed_parallelism(self, *_: Any) -> None:
        """Called by DeepSpeed when it has rounded all weights and builds no optimizer yet: the router's stay in fp32."""
        for parameter, value in self._in_fp32.items():
            parameter.data = value

    def place(self, name: str) -> tuple[str, int | None]:
        """See `RoutedExperts`."""
        if (found := _EXPERT.fullmatch(name)) is None:
            return name.removeprefix(_GATE), None
        number, weight = found.groups()
        return f"experts.{weight}", self._first + int(number)


class _Gate(nn.Module):
    """A router's decisions in the form in which DeepSpeed's layer takes them from its gate."""

    def __init__(self, settings: RoutedSettings) -> None:
        super().__init__()
        self.router = router_of(
            settings.moe,
            experts=settings.experts,
            hidden_size=settings.config.hidden_size,
            device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None,
        )
        self._top_k = settings.moe.top_k
        self._group: dist.ProcessGroup | None = None

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        """Called by DeepSpeed's layer."""
        self._group = group

    def forward(self, hidden_NH: torch.Tensor, routing: torch.Tensor | None, *_: Any) -> tuple:
        """The auxiliary loss (none: the router has added it), slots per expert, number of experts, (K, N) expert of each choice
        (-1: none), place among the expert's tokens, weight; and tokens by expert."""
        weights_NE, map_NE = self.router(hidden_NH[:, None], routing)
        kept_NK, experts_NK = map_NE.int().topk(self._top_k)
        places_NE = map_NE.cumsum(0) - 1
        counts_E = map_NE.sum(0)
        slots = counts_E.max().clamp_min(1)
        dist.all_reduce(slots, dist.ReduceOp.MAX, group=self._group)
        ranks = parallel_state.get_tensor_model_parallel_world_size()  # each sends an equal part of the slots
        return (
            None,
            (slots + ranks - 1) // ranks * ranks,
            map_NE.shape[1],
            torch.where(kept_NK.bool(), experts_NK, -1).t(),
            places_NE.gather(1, experts_NK).t(),
            weights_NE.gather(1, experts_NK).t(),
            counts_E,
        )


class _Expert(nn.Module):
    """A feed-forward network, split over the ranks of expert tensor parallelism, in the form in which DeepSpeed calls it."""

    def __init__(self, settings: RoutedSettings) -> None:
        super().__init__()
        self._settings = settings
        group = parallel_state.get_expert_tensor_parallel_group()
        dense = settings.submodules.shared_experts.submodules
        self.network = feed_forward(settings.config, dense, settings.ffn_hidden_size, group=group)

    def __deepcopy__(self, _: Any) -> "_Expert":
        """DeepSpeed makes its experts from one by copying. A process group cannot be copied; weights are filled later."""
        return _Expert(self._settings)

    def forward(self, slots: torch.Tensor) -> torch.Tensor:
        """(processes, 1, slots, H) -> the same shape. DeepSpeed would drop a bias that is returned beside the output."""
        output, bias = self.network(slots.flatten(0, -2).unsqueeze(1))
        output = output if bias is None else output + bias
        return output.view(slots.shape)


def _share_groups(name: str) -> None:
    """Give DeepSpeed Megatron-Core's process groups of experts, under its name for them; it would make equal ones."""
    groups = deepspeed_module("deepspeed.utils.groups")
    for kind, group in (
        ("PARALLEL", parallel_state.get_expert_model_parallel_group()),
        ("DATA_PARALLEL", parallel_state.get_expert_data_parallel_group()),
    ):
        getattr(groups, f"_EXPERT_{kind}_GROUP")[name] = group
        getattr(groups, f"_EXPERT_{kind}_GROUP_RANKS")[name] = dist.get_process_group_ranks(group)
    groups.expert_tensor_parallel_world_size = parallel_state.get_expert_tensor_parallel_world_size()  # type: ignore[attr-defined]
    vars(deepspeed_module("deepspeed.moe.mappings"))["_gather_tokens"] = _gather_tokens


def _gather_tokens(part: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """DeepSpeed's, which gathers a tensor of several dimensions into a flat one: gloo refuses that."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim)
