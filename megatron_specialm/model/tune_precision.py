"""Whether FP8 is worth it: each linear shape of a model, timed in bf16 and in FP8 on the GPU at hand.

An FP8 product is up to twice as fast, but both factors must first be scaled and rounded. Small matrices do not earn that
back, so it is measured, not assumed.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_recipe

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.terminal import Table
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Linear
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import transformer_config

WORTH = 1.05  # below this ratio FP8 stays off: its coarser numbers are no bargain for what noise could explain
WARMUP, REPEATS, PASSES = 5, 20, 10  # a repeat times so many forward and backward passes


@dataclass(frozen=True)
class LinearShape:
    """A linear of one process: (tokens, inputs) x (inputs, outputs)."""

    name: Linear
    tokens: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Timing:
    """Median seconds of one forward and backward pass."""

    shape: LinearShape
    bf16: float
    fp8: float

    @property
    def ratio(self) -> float:
        """How many times faster FP8 is."""
        return self.bf16 / self.fp8

    @property
    def wins(self) -> bool:
        """Whether FP8 is worth it for this shape."""
        return self.ratio >= WORTH


def linear_shapes(setup: Setup) -> list[LinearShape]:
    """A layer's linears on one process, in the order of the forward pass. The output layer is Megatron-Core's own, which
    has no FP8."""
    model, share = setup.model, setup.parallel.tensor_parallel
    tokens = setup.micro_batch_size * setup.context_length // setup.parallel.context_parallel
    gates = 2 if model.family == "llama" else 1
    sizes: dict[Linear, tuple[int, int]] = {
        "qkv": (model.hidden_size, model.qkv_size // share),
        "proj": (model.hidden_size // share, model.hidden_size),
        "fc1": (model.hidden_size, gates * model.ffn_hidden_size // share),
        "fc2": (model.ffn_hidden_size // share, model.hidden_size),
    }
    return [LinearShape(name, tokens, *size) for name, size in sizes.items()]


def measure(setup: Setup) -> list[Timing]:
    """Time each linear on the current GPU with Transformer Engine's, as the model has it.

    FP8 rounds the weight in every pass here. Training with several micro-batches per step rounds it once per step, and
    is a little faster than this says.

    Raises:
        MachineError: Transformer Engine says that it cannot use this recipe here.
    """
    assert setup.fp8 is not None, "a setup with precision fp8"
    try:
        recipe = get_fp8_recipe(
            transformer_config(
                setup.model, setup.vocabulary_size, precision="fp8", fp8=setup.fp8, parallel=ParallelConfig()
            )
        )
        return [_measure(shape, recipe) for shape in linear_shapes(setup)]
    except (ImportError, AssertionError, RuntimeError) as error:
        raise MachineError(
            f"Transformer Engine cannot time recipe {setup.fp8.recipe}: {error}; stay with bf16"
        ) from error


def _measure(shape: LinearShape, recipe: Any) -> Timing:
    import transformer_engine.pytorch as te  # not on every machine

    linear = te.Linear(shape.inputs, shape.outputs, bias=False, params_dtype=torch.bfloat16, device="cuda")
    tokens = torch.randn(shape.tokens, shape.inputs, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    gradient = torch.randn(shape.tokens, shape.outputs, dtype=torch.bfloat16, device="cuda")

    def one_pass(*, in_fp8: bool) -> None:
        with te.autocast(enabled=in_fp8, recipe=recipe):
            output = linear(tokens)
        output.backward(gradient)
        linear.weight.grad = tokens.grad = None

    return Timing(shape, *_medians_in_turns([lambda: one_pass(in_fp8=False), lambda: one_pass(in_fp8=True)]))


def _medians_in_turns(contenders: Sequence[Callable[[], None]]) -> list[float]:
    """Median seconds of a call of each, by the GPU's clock. Turns, so that its changing frequency meets all alike."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for repeat in range(WARMUP + REPEATS):
        for call, times in zip(contenders, seconds, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(PASSES):
                call()
            end.record()
            end.synchronize()
            if repeat >= WARMUP:
                times.append(start.elapsed_time(end) / 1e3 / PASSES)
    return [statistics.median(times) for times in seconds]


def timings_table(timings: Sequence[Timing], *, title: str) -> Table:
    """A row per shape: its size, microseconds in bf16 and FP8, the ratio, and what it says."""
    header = ["linear", "tokens x in x out", "bf16 us", "FP8 us", "ratio", "keep"]
    lines = []
    for timing in timings:
        shape = timing.shape
        lines.append([
            shape.name, f"{shape.tokens:,} x {shape.inputs:,} x {shape.outputs:,}", f"{timing.bf16 * 1e6:,.1f}",
            f"{timing.fp8 * 1e6:,.1f}", f"{timing.ratio:.2f}", "FP8" if timing.wins else "bf16",
        ])  # fmt: skip
    return Table(title, header, lines, 2)


def advice(timings: Sequence[Timing]) -> str:
    """What to set, and what it saves, in one line."""
    winners = [timing for timing in timings if timing.wins]
    if not winners:
        return f"set `precision: bf16`: no linear is {WORTH:.2f} times as fast in FP8"
    names = ", ".join(timing.shape.name for timing in winners)
    before = sum(timing.bf16 for timing in timings)
    after = before - sum(timing.bf16 - timing.fp8 for timing in winners)
    return (
        f"set `precision: fp8` and `fp8.linears: [{names}]`: a layer's linears take {after * 1e6:,.0f} us instead of "
        f"{before * 1e6:,.0f} ({before / after:.2f}x)"
    )
