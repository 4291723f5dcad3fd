"""Loss curves on real text, byte by byte, from the same first weights and windows in fp32, bf16 and FP8."""

from collections.abc import Generator, Iterator

import numpy as np
from smoke_corpus import docstrings, take

from gpu_check.figures import Figure, at_most
from gpu_check.training import RECIPES, engine_of, free, preset
from megatron_specialm.base.accelerator import find_accelerator
from megatron_specialm.base.errors import MachineError
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Fp8Config, Precision
from megatron_specialm.config.schedule import learning_rate
from megatron_specialm.config.training import Schedule
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.capabilities import lacking
from megatron_specialm.estimate.setup import Setup

PACKAGES = ("torch", "numpy")  # the text is their docstrings; every training machine has them
CHARACTERS = 2_000_000
BYTES = 256
LAST = 20  # steps whose mean loss is compared
GAPS = {"bf16": 0.02, "fp8": 0.03}  # tolerated difference of that mean from fp32's, in nats


def loss_curves(*, tiny: bool) -> Iterator[Figure]:
    """The quickstart's small model and schedule: every tenth loss of each run, then the differences."""
    steps, windows = (6, 4) if tiny else (300, 64)
    text = _text(CHARACTERS if not tiny else 20_000)
    yield Figure("text", len(text), "bytes")
    with single_process():
        exact = yield from _curve("fp32", "fp32", None, text, steps, windows, tiny=tiny)
        half = yield from _curve("bf16", "bf16", None, text, steps, windows, tiny=tiny)
        yield from _gaps("bf16", half, exact, GAPS["bf16"], judged=not tiny)
        for recipe in RECIPES:
            low = yield from _curve(f"FP8 {recipe}", "fp8", Fp8Config(recipe=recipe), text, steps, windows, tiny=tiny)
            yield from _gaps(f"FP8 {recipe}", low, exact, GAPS["fp8"], judged=not tiny)


def _curve(
    name: str, precision: Precision, fp8: Fp8Config | None, text: np.ndarray, steps: int, windows: int, *, tiny: bool
) -> Generator[Figure, None, list[float]]:
    """Yields figures; returns the losses, nats per byte."""
    context = 16 if tiny else 128
    setup = Setup(
        preset("nano" if tiny else "tiny"), ParallelConfig(), precision, BYTES, context, windows, windows, fp8
    )
    if reason := lacking(setup, find_accelerator()):
        raise MachineError(str(reason))
    free()
    engine = engine_of(setup, first_weights=lambda model: model.initialize(seed=0))
    schedule = Schedule(kind="wsd", warmup_steps=40, decay_fraction=0.3)
    losses = []
    for step in range(steps):
        rate = learning_rate(step, peak=2e-3, steps=steps, schedule=schedule)
        losses.append(engine.train_step(_batch(text, setup, step), learning_rate=rate).loss.mean)
        if step % (steps // 6) == 0:
            yield Figure(f"{name}: loss at step {step}", losses[-1], "nats/byte")
    yield Figure(f"{name}: mean loss of the last {LAST} steps", float(np.mean(losses[-LAST:])), "nats/byte")
    return losses


def _gaps(name: str, losses: list[float], exact: list[float], bound: float, *, judged: bool) -> Iterator[Figure]:
    end = abs(float(np.mean(losses[-LAST:])) - float(np.mean(exact[-LAST:])))
    yield at_most(f"{name}: gap to fp32 at the end", end, bound, "nats/byte", judged=judged)
    largest = max(abs(one - other) for one, other in zip(losses, exact, strict=True))
    yield Figure(f"{name}: largest gap to fp32 at any step", largest, "nats/byte")


def _text(characters: int) -> np.ndarray:
    share, seen = characters // len(PACKAGES), set()  # type: ignore[var-annotated]
    texts = [text for package in PACKAGES for text in take(docstrings(package), share, seen)]
    return np.frombuffer("\n\n".join(texts).encode(), np.uint8)


def _batch(text: np.ndarray, setup: Setup, step: int) -> Batch:
    generator = np.random.default_rng((0, step))
    starts = generator.integers(0, len(text) - setup.context_length - 1, setup.global_batch_size)
    windows = text[starts[:, None] + np.arange(setup.context_length + 1)].astype(np.int64)
    return Batch(windows[:, :-1], windows[:, 1:], np.ones_like(windows[:, 1:], np.float32))
