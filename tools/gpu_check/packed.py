"""Steps with padded, sorted and packed windows of uneven length: the same losses, real tokens per second, peak memory."""

from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple, get_args

import torch

from gpu_check.figures import Figure, at_least, at_most, attempt
from gpu_check.memory import MIB, estimate_of
from gpu_check.training import (
    drawn_on_device,
    engine_of,
    free,
    preset,
    seconds_per_call,
    uneven_batch,
    with_smaller_batches,
)
from megatron_specialm.base.accelerator import find_accelerator
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.setup import Setup

GAPS = {"fp32": (1e-5, 1e-4), "bf16": (1e-3, 1e-2)}  # of losses and of gradient norms, relative
OF_FILL = 0.9  # the gain in speed over the gain in fill


class _Step(NamedTuple):
    """The first step's loss and gradient norm; the fill; seconds per step."""

    loss: float
    norm: float
    fill: float
    seconds: float


def beside_padded(*, tiny: bool) -> Iterator[Figure]:
    """In fp32 what is computed; in bf16 also speed and memory."""
    with single_process():
        for name, precision in (("slm-126m", "fp32"), ("slm-126m", "bf16"), ("llm-771m", "bf16")):
            title = f"{name} {precision}"
            yield from attempt(title, _compared(title, _setup(name, precision, tiny=tiny), tiny=tiny))


def _compared(title: str, setup: Setup, *, tiny: bool) -> Generator[Figure, None, None]:
    steps: dict[str, _Step] = {}
    for packing in get_args(Packing):
        measured = partial(_measured, setup, packing, tiny=tiny)
        steps[packing], size = with_smaller_batches(measured, setup.micro_batch_size)
        setup = replace(setup, micro_batch_size=size, packing=packing)
        step, padded, name = steps[packing], steps["none"], f"{title}, {packing}"
        yield Figure(f"{name}: fill", step.fill)
        if packing != "none":
            of_loss, of_norm = GAPS[setup.precision]
            yield at_most(f"{name}: gap of losses to none", abs(step.loss - padded.loss) / padded.loss, of_loss)
            yield at_most(f"{name}: gap of gradient norms", abs(step.norm - padded.norm) / padded.norm, of_norm)
        if setup.precision == "fp32":
            continue
        tokens = int(uneven_batch(setup).mask.sum())
        yield Figure(f"{name}: speed, real tokens", tokens / step.seconds, "tokens/s")
        if packing != "none":
            gain = padded.seconds / step.seconds
            yield Figure(f"{name}: to none", gain, "x")
            yield at_least(f"{name}: of the gain in fill", gain / (step.fill / padded.fill), OF_FILL, judged=not tiny)
        if torch.cuda.is_available():
            yield Figure(f"{name}: peak memory", torch.cuda.max_memory_allocated() / MIB, "MiB")
        estimate = estimate_of(setup, uneven_batch(setup), fused=find_accelerator().has_fused_layers)
        yield Figure(f"{name}: estimated memory", estimate / MIB, "MiB")


def _measured(setup: Setup, packing: Packing, size: int, *, tiny: bool) -> _Step:
    free()
    setup = replace(setup, packing=packing, micro_batch_size=size)
    engine, batch = engine_of(setup, first_weights=drawn_on_device), uneven_batch(setup)
    first = engine.train_step(batch, learning_rate=1e-4)
    seconds = 0.0
    if setup.precision != "fp32":
        times = (0, 1, 1) if tiny else (2, 3, 3)
        seconds = seconds_per_call(
            lambda: engine.train_step(batch, learning_rate=1e-4), warmup=times[0], repeats=times[1], calls=times[2]
        )
    return _Step(first.loss.mean, first.gradient_norm, first.loss.tokens / first.loss.slots, seconds)


def _setup(name: str, precision: str, *, tiny: bool) -> Setup:
    if tiny:
        return Setup(preset("nano"), ParallelConfig(), precision, 300, 32, 8, 2)  # type: ignore[arg-type]
    return Setup(preset(name), ParallelConfig(), precision, 32_000, 1024, 64, 16)  # type: ignore[arg-type]
