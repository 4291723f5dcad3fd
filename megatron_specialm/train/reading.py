"""How a complete model reads a batch on one process, padded or packed.

Legend: B rows and T positions as the model reads them, V vocabulary size.
"""

from typing import NamedTuple

import torch

from megatron_specialm.config.packing import WholePacking
from megatron_specialm.data.packing import packed
from megatron_specialm.data.store import Batch
from megatron_specialm.estimate.flops import keys_saved
from megatron_specialm.model.gpt import Gpt


class Reading(NamedTuple):
    """A batch as a model has read it, the logits (B, T, V), and the keys that attention did not read (`keys_saved`)."""

    batch: Batch
    logits_BTV: torch.Tensor
    saved: int

    @property
    def slots(self) -> int:
        """Token positions that were computed, padding included."""
        return self.batch.tokens.size


def read(model: Gpt, batch: Batch, *, packing: WholePacking) -> Reading:
    """Read windows: each padded to the context length, or all behind each other in one sequence."""
    as_read = batch if packing == "none" else packed(batch)
    logits_BTV = model.logits(torch.from_numpy(as_read.tokens).to(model.device), lengths=as_read.lengths)
    return Reading(as_read, logits_BTV, keys_saved(as_read.lengths or (), batch.tokens.shape[1]))
