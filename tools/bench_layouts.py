"""Benchmark training steps of one model: one process with two threads, and layouts of two processes with one thread each, among
them Megatron-Core's distributed optimizer and DeepSpeed's ZeRO-1.

    python tools/bench_layouts.py [--layers 4 --hidden 256 ...] [--steps 3] [--rounds 5]

They alternate. Prints tokens per second (median over rounds) and the ratio to one process in the same round. Processes
stay alive and sleep between their turns.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from rich.table import Table

from megatron_specialm.base.environment import World
from megatron_specialm.base.terminal import console
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import DeepSpeedConfig, Layout, ParallelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.data.store import Batch
from megatron_specialm.run.processes import limit_threads

THREADS = 2
LAYOUTS = {
    "one process, 2 threads": ParallelConfig(),
    "TP2, 1 thread each": ParallelConfig(tensor_parallel=2),
    "PP2, 1 thread each": ParallelConfig(pipeline_parallel=2),
    "DP2, distributed optimizer": ParallelConfig(data_parallel=2, distributed_optimizer=True),
    "DP2, DeepSpeed ZeRO-1": DeepSpeedConfig(engine="deepspeed", data_parallel=2, zero_stage=1),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"layers": 4, "hidden": 256, "heads": 8, "vocabulary": 4096, "context": 256, "batch": 32,
                        "micro-batch": 4, "steps": 3, "rounds": 5}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        teams = {name: _start(context, layout, args, Path(folder, str(number)))
                 for number, (name, layout) in enumerate(LAYOUTS.items())}  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in teams}
        for turn in range(args.rounds + 1):  # the first is the warm-up
            for name, lines in teams.items():
                for line in lines:
                    line.send(args.steps)
                seconds = max(line.recv() for line in lines)
                if turn:
                    rates[name].append(args.steps * args.batch * args.context / seconds)
        for lines in teams.values():
            for line in lines:
                line.send(0)
    _print(rates)


def _start(context, layout: Layout, args: argparse.Namespace, meeting: Path) -> list[Connection]:
    limit_threads(THREADS // layout.world_size)
    lines = []
    for rank in range(layout.world_size):
        line, other = context.Pipe()
        world = World(rank, layout.world_size, rank, f"file://{meeting}", "benchmark")
        context.Process(target=_work, args=(world, layout, args, other), daemon=True).start()
        lines.append(line)
    return lines


def _work(world: World, layout: Layout, args: argparse.Namespace, line: Connection) -> None:
    from megatron_specialm.engine.open import open_engine
    from megatron_specialm.estimate.setup import Setup

    shape = ModelConfig(
        layers=args.layers, hidden_size=args.hidden, ffn_hidden_size=4 * args.hidden, attention_heads=args.heads
    )
    windows = np.random.default_rng(0).integers(0, args.vocabulary, (args.batch, args.context + 1))
    batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((args.batch, args.context), np.float32))
    setup = Setup(shape, layout, "fp32", args.vocabulary, args.context, args.batch, args.micro_batch)
    with open_engine(
        setup,
        world,
        optimizer=Adam(),
        initialize=lambda model: model.initialize(seed=0),
        threads=THREADS // layout.world_size,
    ) as engine:
        engine.limit_collectives(3600)  # the layouts take turns
        share = args.batch // engine.data_parallel
        own = batch.rows(slice(engine.data_rank * share, (engine.data_rank + 1) * share))
        while steps := line.recv():
            start = time.perf_counter()
            for _ in range(steps):
                engine.train_step(own, learning_rate=1e-4)
            line.send(time.perf_counter() - start)


def _print(rates: dict[str, list[float]]) -> None:
    one = next(iter(rates.values()))
    table = Table("layout", "tokens/s, median", "of one process, median", "per round")
    for name, measured in rates.items():
        ratios = [rate / base for rate, base in zip(measured, one, strict=True)]
        table.add_row(
            name, f"{statistics.median(measured):,.0f}", f"{statistics.median(ratios):.2f}",
            " ".join(f"{ratio:.2f}" for ratio in ratios),
        )  # fmt: skip
    console().print(table)


if __name__ == "__main__":
    main()
