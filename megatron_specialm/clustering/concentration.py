"""How concentrated a set is in few clusters (tables in the paper's appendix): how well one expert can serve it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Concentration:
    """top_share: the frequency of the most frequent cluster, in (0, 1].
    entropy: in nats, from 0 to log K.
    effective_clusters: exp(entropy), the number of equally frequent clusters with that entropy.
    """

    top_share: float
    entropy: float
    effective_clusters: float


def concentration(histogram: np.ndarray) -> Concentration:
    """The concentration of a histogram (K,) of frequencies that sum to 1."""
    present = histogram[histogram > 0]
    entropy = float(present @ -np.log(present))
    return Concentration(float(histogram.max()), entropy, float(np.exp(entropy)))
