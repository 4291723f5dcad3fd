"""Windows of which an encoder knows nothing: their vectors are zero, and all fall to one cluster, whatever they are about."""

import logging

import numpy as np

from megatron_specialm.base.errors import DataError

logger = logging.getLogger(__name__)

WARNED = 0.01  # a few are short ends of documents
REFUSED = 0.5  # the share of a set from which on its clusters say more of the encoder than of the text


class Coverage:
    """Counts such windows of one set.

    Args:
        name: of the set, for messages.
    """

    def __init__(self, name: str) -> None:
        self.windows = self.zero = 0
        self._name = name

    def add(self, vectors: np.ndarray) -> None:
        """The vectors (n, E) of the next windows.

        Raises:
            DataError: some are not finite.
        """
        bad = int((~np.isfinite(vectors).all(axis=1)).sum())
        if bad:
            raise DataError(
                f"text {self._name!r}: the vectors of {bad} of {len(vectors)} windows from {self.windows} on are not finite: "
                "the encoder gave NaN or infinity: use precision fp32 or another encoder"
            )
        self.windows += len(vectors)
        self.zero += int((~vectors.any(axis=1)).sum())

    def check(self) -> None:
        """Warn of zero vectors.

        Raises:
            DataError: half of the windows or more have one.
        """
        share = self.zero / max(self.windows, 1)
        found = f"text {self._name!r}: the encoder knows nothing of {self.zero} of {self.windows} windows ({share:.1%})"
        if share >= REFUSED:
            raise DataError(
                f"{found}: they would all be one cluster: use an encoder for this language (static, sentence-bert), raise "
                "encoder.vocabulary_size, or add text of the kind to the generic set"
            )
        if share > WARNED:
            logger.warning("%s: they are one cluster, whatever they are about", found)
