"""Training objectives: logits and a batch in, a sum over tokens out."""

from typing import NamedTuple

import torch
from torch.nn import functional


class DeviceBatch(NamedTuple):
    """A micro-batch on the device: tokens (B, T), targets (B, T), mask (B, T) with 1 where a target counts."""

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor


def cross_entropy(logits_BTV: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
    """The summed next-token negative log-likelihood in nats, a scalar in fp32. Padding (mask 0) does not count."""
    # Positions first, as the model's logits lie in memory: flattening is free.
    logits, targets, mask = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (logits_BTV, batch.targets, batch.mask))
    return torch.dot(functional.cross_entropy(logits.float(), targets, reduction="none"), mask)
