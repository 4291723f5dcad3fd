"""The loss of a complete model over batches, on one process."""

from collections.abc import Iterable

import torch

from megatron_specialm.data.store import Batch
from megatron_specialm.engine.objective import DeviceBatch, cross_entropy
from megatron_specialm.engine.protocol import LossSum
from megatron_specialm.model.gpt import Gpt


@torch.no_grad()
def score(model: Gpt, batches: Iterable[Batch]) -> LossSum:
    """The negative log-likelihood in nats and the number of tokens, summed over all batches in fp64."""
    model.train(False)
    total, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in batches:
        tokens, targets, mask = (
            torch.from_numpy(part).to(model.device) for part in (batch.tokens, batch.targets, batch.mask)
        )
        on_device = DeviceBatch(tokens, targets, mask)
        total += cross_entropy(model.logits(on_device.tokens).transpose(0, 1), on_device)
        count += int(batch.mask.sum())
    return LossSum(float(total), count)
