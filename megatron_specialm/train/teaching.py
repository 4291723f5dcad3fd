"""Teaching: a teacher reads every window of a token store once, and what it says is cached (`data/teacher.py`).

Legend: N tokens of a window that count, V vocabulary, K entries kept of a token.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from megatron_specialm.data.batches import evaluation_batches
from megatron_specialm.data.store import Batch, TokenStore
from megatron_specialm.data.teacher import ENTROPY, IDS, LOG_PROBABILITIES, TAIL, CacheFormat, CacheWriter
from megatron_specialm.model.gpt import Gpt


@torch.no_grad()
def teach(
    model: Gpt,
    store: TokenStore,
    writer: CacheWriter,
    *,
    batch_size: int,
    seed: int = 0,
    counted: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> int:
    """Write what a whole teacher says of every window, in the order of window ids, and finish the cache.

    Args:
        seed: of the draws of a sampled cache. Those of a window depend on it and the window's id, not on `batch_size`.
        counted: passes the batches on, to tell how far it is.

    Returns:
        The number of tokens taught.
    """
    assert writer.kept.vocabulary_size == model.vocabulary_size
    model.train(False)
    window = tokens = 0
    for batch in counted(evaluation_batches(store, batch_size=batch_size)):
        logits_BTV = model.logits(torch.from_numpy(batch.tokens).to(model.device))
        for logits_TV, mask_T in zip(logits_BTV, batch.mask, strict=True):
            scores_NV = logits_TV[: int(mask_T.sum())].float() / writer.kept.temperature
            generator = np.random.default_rng((seed, window))
            found = keep(torch.log_softmax(scores_NV, 1), writer.kept, generator)
            writer.add({name: tensor.cpu().numpy() for name, tensor in found.items()})
            window, tokens = window + 1, tokens + len(scores_NV)
    writer.finish()
    return tokens


def keep(
    log_probabilities_NV: torch.Tensor, kept: CacheFormat, generator: np.random.Generator
) -> dict[str, torch.Tensor]:
    """What a cache keeps of the teacher's distributions (N, V), by name: (N, ...) each."""
    if kept.kind == "exact":
        return {LOG_PROBABILITIES: log_probabilities_NV}
    if kept.kind == "top-k":
        largest_NK, ids_NK = log_probabilities_NV.topk(kept.count)
        tail_N = log_probabilities_NV.scatter(1, ids_NK, -torch.inf).logsumexp(1)
        return {IDS: ids_NK, LOG_PROBABILITIES: largest_NK, TAIL: tail_N}
    probabilities_NV = log_probabilities_NV.exp()
    uniforms_NK = torch.from_numpy(generator.random((len(probabilities_NV), kept.count)))
    return {
        IDS: _draw(probabilities_NV, uniforms_NK.to(probabilities_NV.device)),
        ENTROPY: torch.special.entr(probabilities_NV).sum(1),
    }


def _draw(probabilities_NV: torch.Tensor, uniforms_NK: torch.Tensor) -> torch.Tensor:
    """Ids (N, K) at which the distribution function passes the uniforms. In fp64: sums of fp32 over a large vocabulary
    lose its rare tokens."""
    cumulated_NV = probabilities_NV.double().cumsum(1)
    ids_NK = torch.searchsorted(cumulated_NV, uniforms_NK * cumulated_NV[:, -1:], right=True)
    return ids_NK.clamp_(max=probabilities_NV.shape[1] - 1)
