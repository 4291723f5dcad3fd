"""Training objectives: logits and a batch in, a sum over tokens out.

Legend: T positions, B sequences, V this process's shard of the vocabulary, N = T * B.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.nn import functional

TEACHER_LOGITS = "teacher_logits"  # the extra input (B, T, V) that a teacher beside the student computes


class DeviceBatch(NamedTuple):
    """A micro-batch on the device.

    tokens, targets: (B, T) token ids.
    mask: (B, T), 1 where a target counts.
    mixture: the number of the mixture of experts that computes it, among those of its step (`model/derived.py`).
    experts: (B, T, E), or (B, 1, E) for whole windows, of an MoE that routes by cluster: True for the expert that computes it.
    extra_inputs: further tensors (B, T, ...) by name, as a teacher's outputs.
    lengths: of the windows of a packed sequence (`data/packing.py`).
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    mixture: int = 0
    experts: torch.Tensor | None = None
    extra_inputs: Mapping[str, torch.Tensor] = MappingProxyType({})
    lengths: Sequence[int] | None = None


class VocabularyShard(NamedTuple):
    """This process's columns of the vocabulary: the ids from `first` on, as many as its logits have; the other processes of
    `group` hold the others."""

    first: int
    group: dist.ProcessGroup


class Objective(Protocol):
    """What training minimizes."""

    def __call__(
        self, logits_TBV: torch.Tensor, batch: DeviceBatch, *, shard: VocabularyShard | None = None
    ) -> torch.Tensor:
        """(T, B, V) logits of this process's shard -> the sum over the tokens that count, a scalar in fp32. All
        processes of the shard's group return the same."""


def cross_entropy(
    logits_TBV: torch.Tensor, batch: DeviceBatch, *, shard: VocabularyShard | None = None
) -> torch.Tensor:
    """The summed next-token negative log-likelihood in nats, a scalar in fp32. Padding (mask 0) does not count.

    With a `shard`, each process of its group holds some columns of the logits, and all return the same sum.
    """
    # Positions first, as the model's logits lie in memory: flattening is free.
    logits_NV = logits_TBV.flatten(0, 1).float()
    targets_N, mask_N = (tensor.t().flatten() for tensor in (batch.targets, batch.mask))
    if shard is None:
        losses_N = functional.cross_entropy(logits_NV, targets_N, reduction="none")
    else:
        losses_N = _SharedCrossEntropy.apply(logits_NV, targets_N - shard.first, shard.group)
    return torch.dot(losses_N, mask_N)


class _SharedCrossEntropy(torch.autograd.Function):
    """Cross-entropy over a vocabulary whose columns lie on several processes: three numbers per token are exchanged."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """(N, V), (N,) relative to this shard's first id -> (N,)."""
        rows, columns = logits_NV.shape
        # A shard may be all padding and have no columns at all.
        largest_N = logits_NV.amax(1) if columns else logits_NV.new_full((rows,), -torch.inf)
        dist.all_reduce(largest_N, dist.ReduceOp.MAX, group)
        softmax_NV = (logits_NV - largest_N[:, None]).exp_()
        here_N = ((targets_N >= 0) & (targets_N < columns)).nonzero().flatten()
        sums_2N = logits_NV.new_zeros(2, rows)
        sums_2N[0] = softmax_NV.sum(1)
        sums_2N[1, here_N] = logits_NV[here_N, targets_N[here_N]]
        dist.all_reduce(sums_2N, group=group)
        softmax_NV /= sums_2N[0][:, None]
        ctx.save_for_backward(softmax_NV, here_N, targets_N[here_N])
        return sums_2N[0].log() + largest_N - sums_2N[1]

    @staticmethod
    def backward(ctx: Any, gradient_N: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        """Softmax less the target, as on one process."""
        softmax_NV, here_N, targets_N = ctx.saved_tensors
        gradient_NV = softmax_NV * gradient_N[:, None]
        gradient_NV[here_N, targets_N] -= gradient_N[here_N]
        return gradient_NV, None, None
