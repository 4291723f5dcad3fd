"""Evaluation and a teacher's reading beside the forward pass of a training step.

    python tools/bench_reading.py runs/quickstart/tokens/legal [--split validation] [--layers 2 --hidden 64 ...] [--rounds 7]

All read every window of the token store's split with one model, in turns, in one process. The forward pass is that of a
training step on packed micro-batches, with what the backward pass needs: from the token store to the loss. Speed is real tokens
per second of CPU time of one thread.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table

from megatron_specialm.base.terminal import console
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.data.batches import evaluation_batches
from megatron_specialm.data.packing import MicroBatches
from megatron_specialm.data.store import TokenStore
from megatron_specialm.data.teacher import CacheFormat, CacheWriter, Kind
from megatron_specialm.engine.objective import DeviceBatch, cross_entropy
from megatron_specialm.engine.open import build_engine, single_process
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.train.evaluation import score
from megatron_specialm.train.teaching import teach

READ = 32  # windows of a batch: the default of evaluate and teach stages


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the artifact of a tokenize stage")
    parser.add_argument("--split", default="validation")
    for name, value in {"layers": 2, "hidden": 64, "heads": 4, "batch": 16, "micro-batch": 16, "rounds": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    store = TokenStore.open(args.store, args.split)
    with tempfile.TemporaryDirectory() as folder, single_process(threads=1):
        contenders = _contenders(args, store, Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(args.rounds + 1):
            for name, read in contenders.items():
                start = time.process_time()
                read()
                if number:  # the first round is a warm-up
                    rates[name].append(store.tokens / (time.process_time() - start))
    table = Table("", "tokens per CPU second, median", "of the forward pass, median", "min", "max")
    forward, *_ = rates.values()
    for name, own in rates.items():
        ratios = [a / b for a, b in zip(own, forward, strict=True)]
        spread = (f"{value:.2f}" for value in (statistics.median(ratios), min(ratios), max(ratios)))
        table.add_row(name, f"{statistics.median(own):,.0f}", *spread)
    console().print(table)


def _contenders(args: argparse.Namespace, store: TokenStore, folder: Path) -> dict[str, Callable[[], object]]:
    shape = ModelConfig(
        layers=args.layers, hidden_size=args.hidden, ffn_hidden_size=4 * args.hidden, attention_heads=args.heads
    )
    setup = Setup(
        shape, ParallelConfig(), "fp32", store.vocabulary_size, store.context_length, args.batch, args.micro_batch,
        packing="packed",
    )  # fmt: skip
    models: list[Gpt] = []
    engine = build_engine(setup, optimizer=Adam(), initialize=models.append)
    (model,) = models
    model.initialize(seed=0)
    cut = MicroBatches("packed", args.micro_batch)

    def forward() -> None:
        model.train()
        for batch in evaluation_batches(store, batch_size=args.batch):
            for part in cut.of([batch]):
                tokens, targets, mask = (torch.from_numpy(values) for values in (part.tokens, part.targets, part.mask))
                logits_TBV = model.logits(tokens, lengths=part.lengths).transpose(0, 1)
                assert cross_entropy(logits_TBV, DeviceBatch(tokens, targets, mask)).requires_grad

    def teaching(kind: Kind, count: int = 0) -> Callable[[], object]:
        kept = CacheFormat(kind, store.vocabulary_size, count=count)

        def read() -> None:
            writer = CacheWriter(folder / kind, kept, context_length=store.context_length, teacher="", store="")
            teach(model, store, writer, batch_size=READ, packing="packed")

        return read

    return {
        "forward pass of a training step": forward,
        "evaluation": lambda: score(model, evaluation_batches(store, batch_size=READ), packing="packed"),
        "validation in a training": lambda: engine.evaluate(evaluation_batches(store, batch_size=args.batch)),
        "teacher, exact": teaching("exact"),
        "teacher, top-k, 50": teaching("top-k", 50),
        "teacher, sampled, 50": teaching("sampled", 50),
    }


if __name__ == "__main__":
    main()
