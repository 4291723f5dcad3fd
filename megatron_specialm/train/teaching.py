"""Write a cache of a teacher's distributions for every window of a token store (`data/teacher.py`).

Legend: N tokens of a window without padding, V vocabulary size, K cached entries per token.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from megatron_specialm.config.packing import WholePacking
from megatron_specialm.data.batches import evaluation_batches
from megatron_specialm.data.store import Batch, TokenStore
from megatron_specialm.data.teacher import ENTROPY, IDS, LOG_PROBABILITIES, TAIL, CacheFormat, CacheWriter
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.train.reading import read


@torch.no_grad()
def teach(
    model: Gpt,
    store: TokenStore,
    writer: CacheWriter,
    *,
    batch_size: int,
    packing: WholePacking = "none",
    seed: int = 0,
    counted: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> tuple[int, int, int]:
    """Write the teacher's distributions for all windows in the order of window ids, and finish the cache.

    Args:
        model: a complete model on one process.
        seed: of the draws of a sampled cache. A window's draws depend on it and on the window's id, not on `batch_size`.
        counted: wraps the batches to report progress.

    Returns:
        The number of tokens in the cache, of slots that were computed for it, and of keys saved (`keys_saved`).
    """
    assert writer.format.vocabulary_size == model.vocabulary_size
    model.train(False)
    window = tokens = slots = saved = 0
    for batch in counted(evaluation_batches(store, batch_size=batch_size)):
        reading = read(model, batch, packing=packing)
        slots, saved, lengths = slots + reading.slots, saved + reading.saved, reading.batch.lengths
        windows = reading.logits_BTV if lengths is None else reading.logits_BTV[0].split(lengths)
        for logits_TV, mask_T in zip(windows, batch.mask, strict=True):
            scores_NV = logits_TV[: int(mask_T.sum())].float() / writer.format.temperature
            generator = np.random.default_rng((seed, window))
            found = compress(torch.log_softmax(scores_NV, 1), writer.format, generator)
            writer.add({name: tensor.cpu().numpy() for name, tensor in found.items()})
            window, tokens = window + 1, tokens + len(scores_NV)
    writer.finish()
    return tokens, slots, saved


def compress(
    log_probabilities_NV: torch.Tensor, cache_format: CacheFormat, generator: np.random.Generator
) -> dict[str, torch.Tensor]:
    """The arrays of a cache by name, (N, ...) each, from the teacher's distributions (N, V)."""
    if cache_format.kind == "exact":
        return {LOG_PROBABILITIES: log_probabilities_NV}
    if cache_format.kind == "top-k":
        largest_NK, ids_NK = log_probabilities_NV.topk(cache_format.count)
        tail_N = log_probabilities_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
        return {IDS: ids_NK, LOG_PROBABILITIES: largest_NK, TAIL: tail_N}
    probabilities_NV = log_probabilities_NV.exp()
    uniforms_NK = torch.from_numpy(generator.random((len(probabilities_NV), cache_format.count)))
    return {
        IDS: _draw(probabilities_NV, uniforms_NK.to(probabilities_NV.device)),
        # Four times as fast as `torch.special.entr`, which takes logarithms again, half of a small teacher's forward pass.
        ENTROPY: -(probabilities_NV * log_probabilities_NV).sum(1),
    }


def _draw(probabilities_NV: torch.Tensor, uniforms_NK: torch.Tensor) -> torch.Tensor:
    """Ids (N, K), drawn by inverting the cumulative distribution at the uniforms. In fp64, because fp32 sums over a large
    vocabulary lose its rare tokens."""
    cumulated_NV = probabilities_NV.double().cumsum(1)
    ids_NK = torch.searchsorted(cumulated_NV, uniforms_NK * cumulated_NV[:, -1:], right=True)
    return ids_NK.clamp_(max=probabilities_NV.shape[1] - 1)
