"""Benchmark a training step of a mixture of experts against the dense model with as many active parameters.

    python tools/bench_moe.py [--rounds 9] [--steps 3] [--threads 1]     small, on a CPU
    tools/gpu_check.sh --parts moe                                       `moe-1b-16e`, on a GPU

The two alternate. Prints milliseconds per step and the ratio, medians over rounds.
"""

import argparse
import statistics
from typing import NamedTuple

from gpu_check.training import drawn_on_device, engine_of, milliseconds_in_turns, preset, random_batch
from rich.table import Table

from megatron_specialm.base.terminal import console
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.setup import Setup


class Comparison(NamedTuple):
    """Medians of a step's milliseconds, and the ratio of each round."""

    dense: float
    moe: float
    ratios: list[float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rounds": 9, "steps": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    table = Table(
        "windows per micro-batch", "dense, ms", "MoE, ms", "ratio, median", "min", "max", title="llama, 4 x 128"
    )
    with single_process(threads=args.threads):
        for windows in (8, 32):
            found = compare(small(windows), rounds=args.rounds, steps=args.steps)
            ratios = (f"{of(found.ratios):.2f}" for of in (statistics.median, min, max))
            table.add_row(str(windows), f"{found.dense:,.0f}", f"{found.moe:,.0f}", *ratios)
    console().print(table)


def small(windows: int) -> Setup:
    """Of `llama-tiny`'s shape, with 8 experts of half its feed-forward size, of which 2 compute a token."""
    dense = preset("llama-tiny").model_dump(exclude={"moe"})
    shape = ModelConfig.model_validate(
        {**dense, "moe": {"experts": 8, "ffn_hidden_size": dense["ffn_hidden_size"] // 2}}
    )
    return Setup(shape, ParallelConfig(), "fp32", 4096, 128, windows, windows)


def large() -> Setup:
    """`moe-1b-16e` in bf16, at a context of 1,024."""
    return Setup(preset("moe-1b-16e"), ParallelConfig(), "bf16", 32_000, 1024, 16, 16)


def dense_of(setup: Setup) -> Setup:
    """With as many active parameters: the feed-forward size that the experts of a token have together."""
    moe = setup.model.moe
    assert moe is not None
    size = moe.top_k * (moe.ffn_hidden_size or setup.model.ffn_hidden_size)
    return setup.changed({"model": setup.model.model_copy(update={"moe": None, "ffn_hidden_size": size})})


def compare(setup: Setup, *, rounds: int, steps: int) -> Comparison:
    """In a process group."""
    batch = random_batch(setup)
    engines = [engine_of(one, first_weights=drawn_on_device) for one in (dense_of(setup), setup)]
    calls = [lambda engine=engine: engine.train_step(batch, learning_rate=1e-4) for engine in engines]  # type: ignore[misc]
    taken = list(milliseconds_in_turns(calls, rounds=rounds, steps=steps))
    dense, moe = (statistics.median(values) for values in zip(*taken, strict=True))
    return Comparison(dense, moe, [with_experts / without for without, with_experts in taken])


if __name__ == "__main__":
    main()
