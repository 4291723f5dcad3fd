"""The loss of a complete model over batches, on one process."""

from collections.abc import Iterable

import torch

from megatron_specialm.config.packing import WholePacking
from megatron_specialm.data.packing import packed
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.objective import DeviceBatch, cross_entropy
from megatron_specialm.engine.protocol import LossSum
from megatron_specialm.estimate.flops import keys_saved
from megatron_specialm.model.gpt import Gpt


@torch.no_grad()
def score(model: Gpt, batches: Iterable[Batch], *, packing: WholePacking = "none") -> LossSum:
    """The negative log-likelihood in nats and the number of tokens, summed over all batches in fp64; the slots, and
    the keys saved."""
    model.train(False)
    total, count, slots, saved = torch.zeros((), dtype=torch.float64, device=model.device), 0, 0, 0
    for batch in batches:
        read = batch if packing == "none" else packed(batch)
        tokens, targets, mask = (
            torch.from_numpy(part).to(model.device) for part in (read.tokens, read.targets, read.mask)
        )
        on_device = DeviceBatch(tokens, targets, mask)
        total += cross_entropy(model.logits(tokens, lengths=read.lengths).transpose(0, 1), on_device)
        count, slots = count + int(read.mask.sum()), slots + tokens.numel()
        saved += keys_saved(read.lengths or (), batch.tokens.shape[1])
    return LossSum(float(total), count, slots, saved)
