"""Measure whether FP8 is worth it: time each linear shape of a model in bf16 and FP8 on this GPU.

An FP8 matrix product is up to twice as fast, but both factors must be scaled and rounded first. For small matrices that costs
more than it saves.
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

WORTH = 1.05  # below this ratio FP8 stays off: noise could explain the gain, and FP8 is less exact
WARMUP, REPEATS, PASSES = 5, 20, 10  # a repeat times PASSES forward and backward passes


@dataclass(frozen=True)
class LinearShape:
    """A linear on one process: (tokens, inputs) x (inputs, outputs)."""

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
    """A layer's linears on one process, in the order of the forward pass. The output layer is excluded: Megatron-Core runs it
    without FP8."""
    model, processes = setup.model, setup.parallel.tensor_parallel
    tokens = setup.micro_batch_size * setup.context_length // setup.parallel.context_parallel
    gates = 2 if model.family == "llama" else 1
    sizes: dict[Linear, tuple[int, int]] = {
        "qkv": (model.hidden_size, model.qkv_size // processes),
        "proj": (model.attention_size // processes, model.hidden_size),
        "fc1": (model.hidden_size, gates * model.ffn_hidden_size // processes),
        "fc2": (model.ffn_hidden_size // processes, model.hidden_size),
    }
    return [LinearShape(name, tokens, *size) for name, size in sizes.items()]


def measure(setup: Setup) -> list[Timing]:
    """Time each linear on the current GPU with Transformer Engine, as in the model.

    Each pass here rounds the weight to FP8. Training with several micro-batches per step rounds it once per step, and is a
    little faster.

    Raises:
        MachineError: Transformer Engine does not support this recipe on this machine.
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
    import transformer_engine.pytorch as te  # not installed on every machine

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
    """Median seconds per call of each, by CUDA events. Calls alternate, so that changes of the GPU's clock affect all alike."""
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
    """A row per shape: its size, microseconds in bf16 and FP8, the ratio, and the precision to use."""
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
    """One line: the setting to use, and the time that it saves."""
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
