"""The loss of a complete model over batches, on one process."""

from collections.abc import Iterable

import torch

from megatron_specialm.config.packing import WholePacking
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.objective import DeviceBatch, cross_entropy
from megatron_specialm.engine.protocol import LossSum
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.train.reading import read


@torch.no_grad()
def score(model: Gpt, batches: Iterable[Batch], *, packing: WholePacking = "none") -> LossSum:
    """The negative log-likelihood in nats and the number of tokens, summed over all batches in fp64; the slots, and
    the keys saved."""
    model.train(False)
    total, count, slots, saved = torch.zeros((), dtype=torch.float64, device=model.device), 0, 0, 0
    for batch in batches:
        reading = read(model, batch, packing=packing)
        parts = reading.batch.tokens, reading.batch.targets, reading.batch.mask
        tokens, targets, mask = (torch.from_numpy(part).to(model.device) for part in parts)
        on_device = DeviceBatch(tokens, targets, mask)
        total += cross_entropy(reading.logits_BTV.transpose(0, 1), on_device)
        count, slots, saved = count + int(batch.mask.sum()), slots + reading.slots, saved + reading.saved
    return LossSum(float(total), count, slots, saved)
