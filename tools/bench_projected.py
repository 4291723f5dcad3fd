"""A pretraining step of a projected network (SLM-pn) beside the SLM's that one of its experts is, in turns.

    python tools/bench_projected.py [--rounds 9] [--steps 3] [--threads 1]     the quickstart's size
    python tools/bench_projected.py --paper                                    slm-126m in bf16: on a GPU only

Each micro-batch is of one expert, drawn at random. Prints milliseconds per step and the ratio, medians over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.terminal import console
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.model import ModelConfig, Projection
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Precision
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.train.distributed import process_group
from megatron_specialm.train.megatron_engine import MegatronEngine


@dataclass(frozen=True)
class Size:
    """What is trained, and how it is cut into micro-batches."""

    model: str
    projection: Projection
    vocabulary: int
    context: int
    windows: tuple[int, ...]  # per step
    micro_batch: int
    precision: Precision


QUICKSTART = Size("tiny", Projection(experts=16, capacity=8, code_size=16), 4096, 128, (16, 32, 64), 8, "fp32")
# 64 thousand and 512 thousand tokens per step.
PAPER = Size("slm-126m", Projection(experts=32, capacity=23, code_size=32), 32_000, 1024, (64, 512), 16, "bf16")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the paper's model; needs a GPU")
    for name, value in {"rounds": 9, "steps": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.paper and not torch.cuda.is_available():
        raise MachineError("--paper needs a CUDA device; without it the quickstart's size is measured")
    size = PAPER if args.paper else QUICKSTART
    page = configs_folder() / "pipelines" / "smoke.yaml"
    shape = load_pipeline(page, [f"stages.slm.model={size.model}"]).stages["slm"].model  # type: ignore[union-attr]
    assert shape is not None
    projected = shape.model_copy(update={"projection": size.projection})
    table = Table("windows per step", "SLM, ms", "SLM-pn, ms", "ratio, median", "min", "max", title=size.model)
    with process_group(ALONE, threads=args.threads):
        engines = [_engine(one, size) for one in (shape, projected)]
        for windows in size.windows:
            batch = _batch(size, windows)
            table.add_row(str(windows), *_measure([_step(engine, batch) for engine in engines], args))
    console().print(table)


def _engine(shape: ModelConfig, size: Size) -> MegatronEngine:
    model = Gpt(shape, vocabulary_size=size.vocabulary, context_length=size.context, precision=size.precision)
    model.initialize(seed=0)
    return MegatronEngine(model, parallel=ParallelConfig(), optimizer=Optimizer(), micro_batch_size=size.micro_batch)


def _batch(size: Size, rows: int) -> Batch:
    generator = np.random.default_rng(0)
    windows = generator.integers(0, size.vocabulary, (rows, size.context + 1))
    experts = generator.integers(0, size.projection.experts, rows // size.micro_batch).repeat(size.micro_batch)
    notes = {MIXTURE: np.eye(size.projection.experts, dtype=np.float32)[experts]}
    return Batch(windows[:, :-1], windows[:, 1:], np.ones((rows, size.context), np.float32), notes)


def _step(engine: MegatronEngine, batch: Batch) -> Callable[[], object]:
    return lambda: engine.train_step(batch, learning_rate=1e-4)


def _measure(steps: list[Callable[[], object]], args: argparse.Namespace) -> list[str]:
    """Medians of a step's milliseconds; and of the ratios within a round, with their range."""
    for step in steps:  # warm up
        step()
    rounds = [[_milliseconds(step, args.steps) for step in steps] for _ in range(args.rounds)]
    ratios = [projected / plain for plain, projected in rounds]
    plain, projected = (statistics.median(values) for values in zip(*rounds, strict=True))
    return [f"{plain:,.0f}", f"{projected:,.0f}", *(f"{of(ratios):.2f}" for of in (statistics.median, min, max))]


def _milliseconds(step: Callable[[], object], count: int) -> float:
    # On a CPU the time that this process was computing: others may share the cores.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    for _ in range(count):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / count * 1e3


if __name__ == "__main__":
    main()
