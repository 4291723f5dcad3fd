"""Benchmark a pretraining step of a mixture of experts against the dense model with the same active parameters.

    python tools/bench_moe.py [--model llama-tiny] [--experts 8] [--top-k 2] [--rounds 9] [--steps 3] [--threads 1]

An expert has the dense model's feed-forward size over `top_k`. The two alternate. Prints milliseconds per step, tokens per
second, MFU on a known GPU and the ratio, medians over rounds. On a CPU the time is the process's own: others may use the cores.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from gpu_check.training import drawn_on_device, engine_of, preset, random_batch, synchronize
from rich.table import Table

from megatron_specialm.base.gpus import utilisation
from megatron_specialm.base.terminal import console
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.setup import Setup


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-tiny")
    sizes = {
        "experts": 8,
        "top-k": 2,
        "context": 128,
        "micro-batch": 8,
        "vocabulary": 4096,
        "rounds": 9,
        "steps": 3,
        "threads": 1,
    }
    for name, value in {**sizes, "rounds": 9, "steps": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    dense = preset(args.model)
    moe = MixtureOfExperts(experts=args.experts, top_k=args.top_k, ffn_hidden_size=dense.ffn_hidden_size // args.top_k)
    models = {"dense": dense, f"{args.experts} experts, top-{args.top_k}": dense.model_copy(update={"moe": moe})}
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    setups = [
        Setup(model, ParallelConfig(), precision, args.vocabulary, args.context, args.micro_batch, args.micro_batch)
        for model in models.values()
    ]
    with single_process(threads=args.threads):
        engines = [engine_of(setup, first_weights=drawn_on_device) for setup in setups]
        batch = random_batch(setups[0])
        calls = [lambda engine=engine: engine.train_step(batch, learning_rate=1e-4) for engine in engines]  # type: ignore[misc]
        for call in calls:  # warm up
            call()
        rounds = [[_seconds(call, args.steps) for call in calls] for _ in range(args.rounds)]
    table = Table("model", "ms per step", "tokens per second", "MFU", "ratio, median", "min", "max", title=dense.name)
    for number, name in enumerate(models):
        seconds = statistics.median(taken[number] for taken in rounds)
        ratios = [taken[number] / taken[0] for taken in rounds]
        share = utilisation(
            flops=setups[number].step_flops, seconds=seconds, devices=1, device_name=engines[number].device_name
        )
        found = [f"{of(ratios):.2f}" for of in (statistics.median, min, max)]
        tokens = args.micro_batch * args.context / seconds
        table.add_row(name, f"{seconds * 1e3:,.0f}", f"{tokens:,.0f}", f"{share:.0%}" if share else "", *found)
    console().print(table)


def _seconds(call: Callable[[], object], count: int) -> float:
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    synchronize()
    start = clock()
    for _ in range(count):
        call()
    synchronize()
    return (clock() - start) / count


if __name__ == "__main__":
    main()
