"""Real tokens per second of a training step with padded, sorted and packed windows, on real text.

    python tools/bench_packing.py TEXT.jsonl.zst ... [--context 512 1024] [--layers 4] [--hidden 128] [--rounds 5]

One tokenizer is trained on all files. Each file is cut into windows as a tokenize stage does. For each file and context length
the packings take turns on the same global batches, in one process. `fill` is real tokens over slots; `of the ratio` is the gain
in speed over padded windows, divided by the gain in fill. Times are CPU times of one thread, which other load disturbs little.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
from rich.table import Table

from megatron_specialm.base.terminal import console
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.data.documents import Documents
from megatron_specialm.data.store import Batch, StoreWriter, TokenStore, describe_store
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.data.tokenizer_making import train_sentencepiece
from megatron_specialm.engine.open import build_engine, single_process
from megatron_specialm.estimate.setup import Setup

DOCUMENTS = 1_000  # of each file


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--context", nargs="+", type=int, default=[512, 1024])
    for name, value in {"layers": 4, "hidden": 128, "heads": 4, "vocabulary": 4096, "batch": 16, "micro-batch": 4,
                        "rounds": 5}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    table = Table("text", "context", "packing", "fill", "tokens/s, median", "min", "max", "speed-up", "of the ratio")
    with tempfile.TemporaryDirectory() as name, single_process(threads=1):
        folder = Path(name)
        texts = {path: list(islice(Documents([str(path)], text_field="text"), DOCUMENTS)) for path in args.texts}
        tokenizer = train_sentencepiece(
            [text for own in texts.values() for text in own],
            folder,
            vocabulary_size=args.vocabulary,
            algorithm="bpe",
            sample_characters=2_000_000,
        )
        for path, own in texts.items():
            for context in args.context:
                store = _store(folder / f"{path.name}-{context}", own, tokenizer, context)
                for row in _rows(store, args):
                    table.add_row(path.name.split(".")[0], str(context), *row)
    console().print(table)


def _store(folder: Path, texts: Sequence[str], tokenizer: Tokenizer, context: int) -> TokenStore:
    folder.mkdir()
    size = tokenizer.vocabulary_size
    writer = StoreWriter(folder, "train", context_length=context, vocabulary_size=size)
    for ids in tokenizer.encode(texts):
        writer.add_document(np.append(ids, tokenizer.eod))
    describe_store(
        folder, splits={"train": writer.finish()}, tokenizer="", context_length=context, vocabulary_size=size,
        eod=tokenizer.eod,
    )  # fmt: skip
    return TokenStore.open(folder, "train")


def _rows(store: TokenStore, args: argparse.Namespace) -> list[list[str]]:
    model = ModelConfig(
        layers=args.layers, hidden_size=args.hidden, ffn_hidden_size=4 * args.hidden, attention_heads=args.heads
    )
    packings: tuple[Packing, ...] = get_args(Packing)
    engines = {
        packing: build_engine(
            Setup(
                model, ParallelConfig(), "fp32", store.vocabulary_size, store.context_length, args.batch,
                args.micro_batch, packing=packing,
            ),
            optimizer=Adam(),
            initialize=lambda gpt: gpt.initialize(seed=0),
        )
        for packing in packings
    }  # fmt: skip
    batches: list[Batch] = [
        store.batch(np.random.default_rng(step).choice(len(store), args.batch, replace=False))
        for step in range(args.rounds + 1)
    ]
    rates: dict[str, list[float]] = {packing: [] for packing in packings}
    slots, tokens = dict.fromkeys(packings, 0), 0
    for number, batch in enumerate(batches):  # the first is a warm-up
        tokens += int(batch.mask.sum()) * (number > 0)
        for packing, engine in engines.items():
            start = time.process_time()
            stats = engine.train_step(batch, learning_rate=1e-4)
            if number:
                rates[packing].append(stats.loss.tokens / (time.process_time() - start))
                slots[packing] += stats.loss.slots
    rows = []
    for packing in packings:
        own = rates[packing]
        gain = statistics.median(a / b for a, b in zip(own, rates["none"], strict=True))
        of_ratio = gain / (slots["none"] / slots[packing])
        speeds = (f"{value:,.0f}" for value in (statistics.median(own), min(own), max(own)))
        rows.append([packing, f"{tokens / slots[packing]:.0%}", *speeds, f"{gain:.2f}", f"{of_ratio:.2f}"])
    return rows


if __name__ == "__main__":
    main()
