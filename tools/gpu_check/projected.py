"""A pretraining step of a projected network against that of the SLM: tools/bench_projected.py at the paper's size."""

import statistics
from collections.abc import Iterator

from bench_projected import PAPER, QUICKSTART, compare

from gpu_check.figures import Figure, at_most
from megatron_specialm.engine.open import single_process

TARGETS = {64: 1.15, 512: 1.05}  # by windows per step


def beside_slm(*, tiny: bool) -> Iterator[Figure]:
    """Milliseconds of both, and the ratio."""
    size, windows = (QUICKSTART, (16,)) if tiny else (PAPER, PAPER.windows)
    with single_process():
        for one in compare(size, windows, rounds=1 if tiny else 5, steps=1):
            name = f"{one.windows * size.context:,} tokens per step"
            yield Figure(f"{name}: SLM", one.plain, "ms")
            yield Figure(f"{name}: SLM-pn", one.projected, "ms")
            ratio = statistics.median(one.ratios)
            yield Figure(f"{name}: ratio", ratio) if tiny else at_most(f"{name}: ratio", ratio, TARGETS[one.windows])
