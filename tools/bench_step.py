"""Benchmark a training step against Transformers' model of the same family, shape, parameter count, batch and Adam.

    python tools/bench_step.py [--family llama] [--layers 4 --hidden 128 ...] [--steps 20] [--rounds 7] [--threads 2]

The two alternate. Prints tokens per second of CPU time of all threads (median over rounds), which other work on the machine
disturbs less than wall-clock time, and the ratio per round. Both accumulate gradients over the same micro-batches, clip by the
global norm and use torch's AdamW.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.table import Table
from torch.nn import functional
from transformers import AutoModelForCausalLM

from megatron_specialm.base.terminal import console
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.convert.huggingface import huggingface_config
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.open import build_engine, single_process
from megatron_specialm.estimate.setup import Setup


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("neox", "llama"), default="neox")
    for name, value in {"layers": 4, "hidden": 128, "heads": 4, "vocabulary": 4096, "context": 128, "batch": 64,
                        "micro-batch": 16, "steps": 10, "rounds": 7, "threads": 2}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    shape = ModelConfig(
        family=args.family,
        layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=4 * args.hidden,
        attention_heads=args.heads,
    )
    windows = np.random.default_rng(0).integers(0, args.vocabulary, (args.batch, args.context + 1))
    batch = Batch(windows[:, :-1], windows[:, 1:], np.ones((args.batch, args.context), np.float32))
    with single_process(threads=args.threads):
        contenders = {
            "megatron_specialm": _ours(shape, args, batch),
            f"transformers {args.family}": _theirs(shape, args, batch),
        }
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for step in contenders.values():  # warm up
            step()
        for _ in range(args.rounds):
            for name, step in contenders.items():
                start = time.process_time()
                for _ in range(args.steps):
                    step()
                rates[name].append(args.steps * batch.tokens.size / (time.process_time() - start))
    _print(rates)


def _ours(shape: ModelConfig, args: argparse.Namespace, batch: Batch) -> Callable[[], object]:
    setup = Setup(shape, ParallelConfig(), "fp32", args.vocabulary, args.context, args.batch, args.micro_batch)
    engine = build_engine(setup, optimizer=Adam(), initialize=lambda model: model.initialize(seed=0))
    return lambda: engine.train_step(batch, learning_rate=1e-4)


def _theirs(shape: ModelConfig, args: argparse.Namespace, batch: Batch) -> Callable[[], object]:
    config = huggingface_config(shape, vocabulary_size=args.vocabulary, context_length=args.context, eod=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)

    def step() -> None:
        optimizer.zero_grad()
        for start in range(0, len(tokens), args.micro_batch):
            rows = slice(start, start + args.micro_batch)
            logits = model(tokens[rows]).logits
            loss = functional.cross_entropy(logits.flatten(0, 1), targets[rows].flatten(), reduction="sum")
            (loss / tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    return step


def _print(rates: dict[str, list[float]]) -> None:
    ours, theirs = rates.values()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    table = Table("", "tokens per CPU second, median", "min", "max")
    for name, values in rates.items():
        table.add_row(name, *(f"{value:,.0f}" for value in (statistics.median(values), min(values), max(values))))
    screen = console()
    screen.print(table)
    screen.print(f"ratio ours / theirs: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
