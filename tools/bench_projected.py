"""Benchmark a pretraining step of a projected network (SLM-pn) against the SLM with the shape of one of its experts.

    python tools/bench_projected.py [--rounds 9] [--steps 3] [--threads 1]     the quickstart's size
    tools/gpu_check.sh --parts projected                                       the paper's size, on a GPU

Each micro-batch belongs to one expert, drawn at random. The two alternate. Prints milliseconds per step and the ratio, medians
over rounds.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpu_check.training import drawn_on_device, engine_of, milliseconds_in_turns, preset, random_batch
from rich.table import Table

from megatron_specialm.base.terminal import console
from megatron_specialm.config.model import Projection
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Precision
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.setup import Setup


@dataclass(frozen=True)
class Size:
    """The model's size, and the sizes of batches and micro-batches."""

    model: str
    projection: Projection
    vocabulary: int
    context: int
    windows: tuple[int, ...]  # per step
    micro_batch: int
    precision: Precision


class Comparison(NamedTuple):
    """Medians of a step's milliseconds, and the ratio of each round."""

    windows: int
    plain: float
    projected: float
    ratios: list[float]


QUICKSTART = Size("tiny", Projection(experts=16, capacity=8, code_size=16), 4096, 128, (16, 32, 64), 8, "fp32")
# 64 thousand and 512 thousand tokens per step.
PAPER = Size("slm-126m", Projection(experts=32, capacity=23, code_size=32), 32_000, 1024, (64, 512), 16, "bf16")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rounds": 9, "steps": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    size = QUICKSTART
    table = Table("windows per step", "SLM, ms", "SLM-pn, ms", "ratio, median", "min", "max", title=size.model)
    with single_process(threads=args.threads):
        for one in compare(size, size.windows, rounds=args.rounds, steps=args.steps):
            ratios = (f"{of(one.ratios):.2f}" for of in (statistics.median, min, max))
            table.add_row(str(one.windows), f"{one.plain:,.0f}", f"{one.projected:,.0f}", *ratios)
    console().print(table)


def compare(size: Size, windows: Sequence[int], *, rounds: int, steps: int) -> Iterator[Comparison]:
    """One comparison per number of windows, in a process group; the two networks alternate."""
    shape = preset(size.model)
    setup = Setup(
        shape.model_copy(update={"projection": size.projection}), ParallelConfig(), size.precision, size.vocabulary,
        size.context, size.micro_batch, size.micro_batch,
    )  # fmt: skip
    engines = [engine_of(one, first_weights=drawn_on_device) for one in (setup.changed({"model": shape}), setup)]
    for count in windows:
        batch = random_batch(setup.changed({"global_batch_size": count}))
        calls = [lambda engine=engine: engine.train_step(batch, learning_rate=1e-4) for engine in engines]  # type: ignore[misc]  # noqa: B023
        taken = list(milliseconds_in_turns(calls, rounds=rounds, steps=steps))
        plain, projected = (statistics.median(values) for values in zip(*taken, strict=True))
        yield Comparison(count, plain, projected, [with_experts / without for without, with_experts in taken])


if __name__ == "__main__":
    main()
