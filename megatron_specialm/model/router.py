"""The router of an MoE layer: which experts compute a token, with which weights, and the losses that balance them.

The mathematics does not depend on the engine (docs/moe.md). Logits and all that follows from them are in fp32. Padding is sent
to no expert, and counts in no loss. An MoE that routes by cluster has `ClusterRouter`, which learns nothing.

Legend: T positions, B sequences, N = T * B tokens of this process, E experts, K experts per token, H hidden size.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import nn
from torch.nn import functional

from megatron_specialm.config.moe import MixtureOfExperts

# What a router sums over its tokens, behind the number of times that each expert was chosen.
SUMS = ("tokens", "dropped", "aux_loss", "z_loss", "entropy")


class Router(nn.Module):
    """Chooses the experts of tokens.

    Args:
        group: the processes that have other tokens of the same micro-batches, as under sequence and context parallelism.

    `sums` is what the router has summed over training tokens since it was last set to zero: a vector (E + len(SUMS),), with
    the number of times that each expert was chosen in front.
    """

    def __init__(
        self,
        moe: MixtureOfExperts,
        *,
        experts: int,
        hidden_size: int,
        device: torch.device | None = None,
        sequence_parallel: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size, device=device))
        self.weight.keep_fp32 = True  # type: ignore[attr-defined]
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.expert_bias: nn.Parameter | None = None
        if moe.bias_update_rate:
            self.expert_bias = nn.Parameter(torch.zeros(experts, device=device), requires_grad=False)
            self.expert_bias.keep_fp32 = True  # type: ignore[attr-defined]
        self._moe, self._experts, self._group = moe, experts, group
        self.sums = torch.zeros(experts + len(SUMS), device=device)

    def forward(
        self, hidden_TBH: torch.Tensor, padding_TB: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, B, H) -> the weights (N, E) in fp32 of each token's experts, and which ones they are (N, E). In training the
        auxiliary losses get their gradients through the weights.

        Args:
            padding_TB: True for padding.
        """
        moe = self._moe
        logits_NE = functional.linear(hidden_TBH.flatten(0, 1).float(), self.weight.float())
        scores_NE = logits_NE.sigmoid() if moe.bias_update_rate else logits_NE.softmax(1)
        ranked_NE = scores_NE.detach() if self.expert_bias is None else scores_NE.detach() + self.expert_bias
        choices_NK = ranked_NE.topk(moe.top_k).indices
        real_N1 = torch.ones_like(logits_NE[:, :1]) if padding_TB is None else 1.0 - padding_TB.reshape(-1, 1).float()
        kept_NK = real_N1.bool().expand_as(choices_NK)
        if self.training and moe.capacity_factor is not None:
            kept_NK = self._within_capacity(choices_NK, kept_NK)
        weights_NK = scores_NE.gather(1, choices_NK) * kept_NK
        if moe.top_k > 1:
            weights_NK = weights_NK / weights_NK.sum(1, keepdim=True).clamp_min(1e-20)
        weights_NE = torch.zeros_like(scores_NE).scatter(1, choices_NK, weights_NK)
        map_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter(1, choices_NK, kept_NK)
        if self.training and torch.is_grad_enabled():  # not in the first pass of a layer that is recomputed
            chosen_NE = torch.zeros_like(scores_NE).scatter(1, choices_NK, real_N1.expand_as(weights_NK))
            balance, z_loss = self._losses(logits_NE, scores_NE, chosen_NE, real_N1)
            if moe.aux_loss or moe.z_loss:
                total = moe.aux_loss * balance + moe.z_loss * z_loss
                weights_NE = MoEAuxLossAutoScaler.apply(weights_NE, total)
            self._count(scores_NE, chosen_NE, map_NE, real_N1, balance, z_loss)
        return weights_NE, map_NE

    def _losses(
        self, logits_NE: torch.Tensor, scores_NE: torch.Tensor, chosen_NE: torch.Tensor, real_N1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's part of the two losses of a micro-batch, times the micro-batch's tokens: gradients are divided once by
        the tokens of the global batch.

        The load-balancing loss is E times the sum over experts of its share of the choices times its mean probability; 1 if
        both are even (arXiv 2101.03961, equation 4). The z-loss is the mean square of the logits' logsumexp.
        """
        choices_E = chosen_NE.sum(0)
        if self._group is not None and self._group.size() > 1:
            dist.all_reduce(choices_E, group=self._group)
        choices = choices_E.sum().clamp_min(1.0)  # tokens times K
        probabilities_NE = scores_NE / scores_NE.sum(1, keepdim=True) if self._moe.bias_update_rate else scores_NE
        balance = self._experts * torch.dot(choices_E / choices, (probabilities_NE * real_N1).sum(0))
        z_loss = (logits_NE.logsumexp(1).square() * real_N1[:, 0]).sum()
        return balance, z_loss

    def _within_capacity(self, choices_NK: torch.Tensor, kept_NK: torch.Tensor) -> torch.Tensor:
        """Which choices are within the capacity of their experts: first choices come first, and earlier positions."""
        moe = self._moe
        size, rank = (1, 0) if self._group is None else (self._group.size(), self._group.rank())
        codes_NK = torch.where(kept_NK, choices_NK, self._experts)  # an expert of its own for padding
        if size > 1:
            parts = [torch.empty_like(codes_NK) for _ in range(size)]
            dist.all_gather(parts, codes_NK.contiguous(), group=self._group)
            codes_NK = torch.cat(parts)
        tokens = len(codes_NK)
        capacity = max(moe.min_capacity, math.ceil(moe.capacity_factor * tokens * moe.top_k / self._experts))  # type: ignore[operator]
        one_hot = functional.one_hot(codes_NK.t().reshape(-1), self._experts + 1)
        place = (one_hot.cumsum(0) * one_hot).sum(1).view(moe.top_k, tokens).t()  # within the expert, from 1
        return ((place <= capacity) & (codes_NK < self._experts)).chunk(size)[rank]

    @torch.no_grad()
    def _count(
        self,
        scores_NE: torch.Tensor,
        chosen_NE: torch.Tensor,
        map_NE: torch.Tensor,
        real_N1: torch.Tensor,
        balance: torch.Tensor,
        z_loss: torch.Tensor,
    ) -> None:
        chosen_E = chosen_NE.sum(0)
        probabilities_NE = scores_NE / scores_NE.sum(1, keepdim=True)
        entropy = (torch.special.entr(probabilities_NE) * real_N1).sum()
        dropped = chosen_E.sum() - map_NE.sum()
        self.sums += torch.cat([chosen_E, torch.stack([real_N1.sum(), dropped, balance, z_loss, entropy])])

    @torch.no_grad()
    def update_bias(self, chosen_E: torch.Tensor) -> None:
        """Move `expert_bias` after a step: up for experts that were chosen less often than the mean, down for others.

        Args:
            chosen_E: how often each expert was chosen in the step, over all processes.
        """
        assert self.expert_bias is not None
        self.expert_bias.add_((chosen_E.mean() - chosen_E).sign(), alpha=self._moe.bias_update_rate)


class ClusterRouter(nn.Module):
    """Sends all tokens of a window to the expert that the window comes with."""

    def forward(self, _: torch.Tensor, experts_TBE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, B, E), True for a token's expert -> the weights (N, E) in fp32 of each token's experts, which are 1, and which
        ones they are (N, E)."""
        map_NE = experts_TBE.flatten(0, 1)
        return map_NE.float(), map_NE


def router_of(moe: MixtureOfExperts, **learned: Any) -> Router | ClusterRouter:
    """The router of a layer.

    Args:
        learned: what `Router` is made with.
    """
    return ClusterRouter() if moe.by_cluster else Router(moe, **learned)


@contextlib.contextmanager
def auxiliary_losses_times(factor: float) -> Iterator[None]:
    """Within, backward passes multiply the auxiliary losses' gradients by a factor, as the engine does the loss's. It is 1
    otherwise."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(factor))
    try:
        yield
    finally:
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
