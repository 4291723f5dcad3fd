"""Windows of which an encoder knows nothing: their vectors are zero, and all fall to one cluster, whatever they are about."""

import logging

import numpy as np

from megatron_specialm.base.errors import DataError
from megatron_specialm.clustering.vectors import count_not_finite

logger = logging.getLogger(__name__)

WARNED = 0.01  # a few are short ends of documents
REFUSED = 0.5  # the share of a set from which on its clusters say more of the encoder than of the text


def count_zero(vectors: np.ndarray, *, name: str, first: int) -> int:
    """How many of some vectors (n, E) are zero.

    Args:
        name: of the set that they are of, for messages.
        first: the number of the first one's window.

    Raises:
        DataError: some are not finite.
    """
    if bad := count_not_finite(vectors):
        raise DataError(
            f"text {name!r}: the vectors of {bad} of {len(vectors)} windows from {first} on are not finite: the encoder gave "
            "NaN or infinity: use precision fp32 or another encoder"
        )
    return int((~vectors.any(axis=1)).sum())


def check_coverage(name: str, *, zero: int, windows: int) -> None:
    """Judge a whole set by how many of its windows have a zero vector: more than a few are warned of.

    Raises:
        DataError: half of them or more.
    """
    share = zero / max(windows, 1)
    found = f"text {name!r}: the encoder knows nothing of {zero} of {windows} windows ({share:.1%})"
    if share >= REFUSED:
        raise DataError(
            f"{found}: they would all be one cluster: use an encoder for this language (static, sentence-bert), raise "
            "encoder.vocabulary_size, or add text of the kind to the generic set"
        )
    if share > WARNED:
        logger.warning("%s: they are one cluster, whatever they are about", found)
