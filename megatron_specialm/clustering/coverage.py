"""Windows that an encoder does not cover. Their vectors are zero, so they all get the same cluster, whatever their subject."""

import logging

import numpy as np

from megatron_specialm.base.errors import DataError
from megatron_specialm.clustering.vectors import count_not_finite

logger = logging.getLogger(__name__)

WARNED = 0.01  # fraction of a set; a few such windows are short ends of documents
REFUSED = 0.5  # fraction of a set


def count_zero(vectors: np.ndarray, *, name: str, first: int) -> int:
    """The number of zero vectors among (n, E) vectors.

    Args:
        name: the set, for messages.
        first: the number of the first window, for messages.

    Raises:
        DataError: a vector is not finite.
    """
    if bad := count_not_finite(vectors):
        raise DataError(
            f"text {name!r}: the vectors of {bad} of {len(vectors)} windows from {first} on are not finite: the encoder gave "
            "NaN or infinity: use precision fp32 or another encoder"
        )
    return int((~vectors.any(axis=1)).sum())


def check_coverage(name: str, *, zero: int, windows: int) -> None:
    """Warn if more than a few windows of a set have zero vectors.

    Raises:
        DataError: at least half of them have.
    """
    fraction = zero / max(windows, 1)
    found = f"text {name!r}: the encoder knows nothing of {zero} of {windows} windows ({fraction:.1%})"
    if fraction >= REFUSED:
        raise DataError(
            f"{found}: they would all be one cluster: use an encoder for this language (static, sentence-bert), raise "
            "encoder.vocabulary_size, or add text of the kind to the generic set"
        )
    if fraction > WARNED:
        logger.warning("%s: they are one cluster, whatever they are about", found)
