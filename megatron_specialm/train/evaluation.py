"""The loss of a model over batches, on one process."""

from collections.abc import Iterable

import torch

from megatron_specialm.data.store import Batch
from megatron_specialm.model import gpt
from megatron_specialm.train.engine import LossSum
from megatron_specialm.train.losses import DeviceBatch, cross_entropy


@torch.no_grad()
def score(model: torch.nn.Module, batches: Iterable[Batch], *, vocabulary_size: int) -> LossSum:
    """Summed negative log-likelihood in nats, and the tokens it is over. Added up in fp64."""
    model.eval()
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        on_device = DeviceBatch(*(torch.from_numpy(part).to(device) for part in batch))
        total += cross_entropy(gpt.logits(model, on_device.tokens, vocabulary_size=vocabulary_size), on_device)
        count += int(batch.mask.sum())
    return LossSum(float(total), count)
