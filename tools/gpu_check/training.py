"""Models, batches and timers that several parts use."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch

from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.open import build_engine
from megatron_specialm.engine.protocol import Engine
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt

T = TypeVar("T")

RECIPES: tuple[Literal["delayed", "tensorwise", "blockwise"], ...] = ("delayed", "tensorwise", "blockwise")


def preset(name: str) -> ModelConfig:
    """A model of configs/models."""
    config = configs_folder() / "pipelines" / "smoke.yaml"
    shape = load_pipeline(config, [f"stages.slm.model={name}"]).stages["slm"].model  # type: ignore[union-attr]
    assert shape is not None
    return shape


def engine_of(setup: Setup, *, first_weights: Callable[[Gpt], None]) -> Engine:
    """The engine of a setup before its first step; call it in a process group."""
    return build_engine(setup, optimizer=Adam(), initialize=first_weights)


@torch.no_grad()
def drawn_on_device(model: Gpt) -> None:
    """Draw first weights on the device, for a short measurement: `Gpt.initialize` draws on the CPU, which takes longer than the
    measurement for a large model. Norms and biases are left as they were built."""
    generator = torch.Generator(model.device).manual_seed(0)
    for weight in model.weights():
        if weight.parameter.dim() > 1:
            weight.parameter.normal_(std=model.config.init_std, generator=generator)


def random_batch(setup: Setup) -> Batch:
    """A step's windows from a skewed vocabulary, so that there is something to learn. For a projected network each micro-batch
    belongs to one expert."""
    generator = np.random.default_rng(0)
    rows, shape = setup.global_batch_size, (setup.global_batch_size, setup.context_length + 1)
    windows = generator.zipf(1.3, shape).clip(max=setup.vocabulary_size) - 1
    extra_inputs = {}
    if setup.model.projection is not None:
        experts = setup.model.projection.experts
        chosen = generator.integers(0, experts, rows // setup.micro_batch_size).repeat(setup.micro_batch_size)
        extra_inputs[MIXTURE] = np.eye(experts, dtype=np.float32)[chosen]
    return Batch(windows[:, :-1], windows[:, 1:], np.ones((rows, setup.context_length), np.float32), extra_inputs)


def uneven_batch(setup: Setup) -> Batch:
    """The same with windows as short as those of real text: lengths are log-normal, about 40% of the context on average."""
    batch, context = random_batch(setup), setup.context_length
    lengths = np.random.default_rng(1).lognormal(np.log(0.3 * context), 0.9, setup.global_batch_size).clip(1, context)
    return batch._replace(mask=(np.arange(context) < lengths.astype(int)[:, None]).astype(np.float32))


def seconds_per_call(call: Callable[[], object], *, warmup: int, repeats: int, calls: int) -> float:
    """The median over repeats. The device is synchronized at the begin and end of a repeat."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds)


def milliseconds_in_turns(
    calls: Sequence[Callable[[], object]], *, rounds: int, steps: int
) -> Iterator[tuple[float, ...]]:
    """Of each round, the milliseconds of each call, the mean of several; the calls take turns. One of each is made before, to
    warm up."""
    for call in calls:
        call()
    for _ in range(rounds):
        yield tuple(_milliseconds(call, steps) for call in calls)


def _milliseconds(call: Callable[[], object], count: int) -> float:
    # On a CPU: this process's CPU time, because others may use the cores.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    synchronize()
    start = clock()
    for _ in range(count):
        call()
    synchronize()
    return (clock() - start) / count * 1e3


def synchronize() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Free unreferenced memory. Megatron-Core's wrappers have reference cycles, so the garbage collector must run."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def with_smaller_batches(measure: Callable[[int], T], size: int) -> tuple[T, int]:
    """`measure` with a micro-batch of `size`, or the largest half, quarter ... of it that fits into memory. Returns its result
    and that size."""
    while True:
        free()
        try:
            return measure(size), size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        print(f"  out of memory: again with micro-batches of {size}", flush=True)
