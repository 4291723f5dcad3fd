"""Benchmark training steps of one model: one process with two threads, and layouts of two processes with one thread each, among
them Megatron-Core's distributed optimizer and DeepSpeed's ZeRO-1.

    python tools/bench_layouts.py [--layers 4 --hidden 256 ...] [--steps 3] [--rounds 5]

They alternate. Prints tokens per second (median over rounds) and the ratio to one process in the same round. Processes
stay alive and sleep between their turns.

In each round the parts that `specialm check --nodes` computes a step from are measured too: matrix products, attention,
operations on activations, and all-reduces. `estimate/step_time.py` predicts each layout's tokens per second from them.
"""

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
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
from megatron_specialm.estimate.flops import attention_flops
from megatron_specialm.estimate.hardware import Hardware
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.estimate.step_time import ACTIVATION_PASSES, step_time
from megatron_specialm.run.processes import limit_threads

THREADS = 2
COPIES = 16  # of the tensors of small parts, used in turn: each has left the processor's cache before it is used again
PARTS = -1  # sent in place of a number of steps: measure the parts
ALONE, PAIR = "one process, 2 threads", "DP2, distributed optimizer"
LAYOUTS = {
    ALONE: ParallelConfig(),
    "TP2, 1 thread each": ParallelConfig(tensor_parallel=2),
    "PP2, 1 thread each": ParallelConfig(pipeline_parallel=2),
    PAIR: ParallelConfig(data_parallel=2, distributed_optimizer=True),
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
        predicted: dict[str, list[float]] = {
            name: [] for name, layout in LAYOUTS.items() if layout.engine == "megatron"
        }
        for turn in range(args.rounds + 1):  # the first is the warm-up
            alone, pair = (_ask(teams[name], PARTS) for name in (ALONE, PAIR))
            for name in predicted if turn else ():
                seconds = _predict(LAYOUTS[name], alone if name == ALONE else pair, args)
                predicted[name].append(args.batch * args.context / seconds)
            for name, lines in teams.items():
                seconds = max(_ask(lines, args.steps))
                if turn:
                    rates[name].append(args.steps * args.batch * args.context / seconds)
        for lines in teams.values():
            for line in lines:
                line.send(0)
    _print(rates, predicted)


def _ask(lines: list[Connection], request: int) -> list:
    for line in lines:
        line.send(request)
    return [line.recv() for line in lines]


def _predict(layout: Layout, parts: list[Hardware], args: argparse.Namespace) -> float:
    """Seconds of a step on processes with these parts: the slowest counts."""
    setup = _setup(layout, args)
    return max(step_time(setup, hardware, fused=False, checkpoint_every=1).total for hardware in parts)


def _setup(layout: Layout, args: argparse.Namespace) -> Setup:
    shape = ModelConfig(
        layers=args.layers, hidden_size=args.hidden, ffn_hidden_size=4 * args.hidden, attention_heads=args.heads
    )
    return Setup(shape, layout, "fp32", args.vocabulary, args.context, args.batch, args.micro_batch)


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

    windows = np.random.default_rng(0).integers(0, args.vocabulary, (args.batch, args.context + 1))
    batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((args.batch, args.context), np.float32))
    with open_engine(
        _setup(layout, args),
        world,
        optimizer=Adam(),
        initialize=lambda model: model.initialize(seed=0),
        threads=THREADS // layout.world_size,
    ) as engine:
        engine.limit_collectives(3600)  # the layouts take turns
        share = args.batch // engine.data_parallel
        own = batch.rows(slice(engine.data_rank * share, (engine.data_rank + 1) * share))
        while steps := line.recv():
            if steps == PARTS:
                line.send(_measure_parts(args, layout.world_size))
                continue
            start = time.perf_counter()
            for _ in range(steps):
                engine.train_step(own, learning_rate=1e-4)
            line.send(time.perf_counter() - start)


def _measure_parts(args: argparse.Namespace, processes: int) -> Hardware:
    """The rates of this process, beside the others of its layout, on tensors of a micro-batch's size."""
    import torch
    import torch.distributed as dist

    from megatron_specialm.model.attention import causal_attention

    shape, tokens = _setup(ParallelConfig(), args).model, args.micro_batch * args.context
    sizes = [*shape.linear_sizes().values()] * shape.layers + [(args.vocabulary, args.hidden)]
    linears = [(torch.randn(tokens, into), torch.randn(out, into), torch.randn(tokens, out)) for out, into in sizes]
    heads = (args.context, args.micro_batch, args.heads, shape.head_size)
    attended = itertools.cycle([[torch.randn(heads) for _ in range(4)] for _ in range(COPIES)])
    normed = itertools.cycle([(torch.randn(tokens, args.hidden), torch.randn(tokens, 4 * args.hidden))
                              for _ in range(COPIES)])  # fmt: skip
    gamma, beta = (torch.ones(args.hidden, requires_grad=True) for _ in range(2))

    def products() -> None:  # each linear's output, and the gradients of its input and weight
        for given, weight, gradient in linears:
            torch.mm(given, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), given)

    def attention() -> None:
        *projected, gradient = next(attended)
        query, key, value = (tensor.detach().requires_grad_() for tensor in projected)
        causal_attention(query, key, value).backward(gradient.flatten(2))

    def activations() -> None:
        narrow, wide = next(normed)
        first, second = narrow.detach().requires_grad_(), wide.detach().requires_grad_()
        torch.nn.functional.layer_norm(first, (args.hidden,), gamma, beta).backward(narrow)
        torch.nn.functional.gelu(second).backward(wide)

    def all_reduce(tensor: torch.Tensor) -> Callable[[], None]:
        return lambda: dist.all_reduce(tensor)

    narrow, wide = next(normed)
    kept = 2 * narrow.nbytes + 2 * wide.nbytes  # inputs and outputs, as estimate/memory.py counts them
    collective, link = 0.0, float("inf")
    if processes > 1:
        collective = _seconds(all_reduce(torch.zeros(1)))
        link = narrow.nbytes / (_seconds(all_reduce(torch.zeros_like(narrow))) - collective)
    return Hardware(
        products=3 * 2 * tokens * sum(out * into for out, into in sizes) / _seconds(products, repeat=2),
        attention=3 * tokens * attention_flops(shape, args.context) / shape.layers / _seconds(attention),
        memory=ACTIVATION_PASSES * kept / _seconds(activations),
        link=link,
        fabric=link,
        host=float("inf"),
        per_node=processes,
        launch=0.0,  # computed by the process itself
        collective=collective,
    )


def _seconds(work: Callable[[], None], repeat: int = 20) -> float:
    work()
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - start) / repeat


def _print(rates: dict[str, list[float]], predicted: dict[str, list[float]]) -> None:
    one = next(iter(rates.values()))
    table = Table("layout", "tokens/s, median", "of one process, median", "per round", "predicted", "of measured")
    for name, measured in rates.items():
        ratios = [rate / base for rate, base in zip(measured, one, strict=True)]
        table.add_row(
            name, f"{statistics.median(measured):,.0f}", f"{statistics.median(ratios):.2f}",
            " ".join(f"{ratio:.2f}" for ratio in ratios), *_compare(measured, predicted.get(name)),
        )  # fmt: skip
    console().print(table)


def _compare(measured: list[float], predicted: list[float] | None) -> list[str]:
    """The median prediction, and its ratio to the measurement of the same round, by round."""
    if predicted is None:
        return ["", ""]
    ratios = [guess / rate for guess, rate in zip(predicted, measured, strict=True)]
    each = " ".join(f"{ratio:.2f}" for ratio in ratios)
    return [f"{statistics.median(predicted):,.0f}", f"{statistics.median(ratios):.2f} ({each})"]


if __name__ == "__main__":
    main()
