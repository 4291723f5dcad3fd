"""Training steps at sequence length 1,024: ours against Transformers', and FP8 against bf16. Random tokens, AdamW."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

import torch
from torch.nn import functional

from gpu_check.figures import Figure, at_most, attempt
from gpu_check.training import (
    RECIPES,
    drawn_on_device,
    engine_of,
    free,
    preset,
    random_batch,
    seconds_per_call,
    with_smaller_batches,
)
from megatron_specialm.base.accelerator import find_accelerator, name_of_device
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.gpus import utilisation
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Fp8Config
from megatron_specialm.convert.huggingface import huggingface_config
from megatron_specialm.engine.open import single_process
from megatron_specialm.estimate.capabilities import lacking
from megatron_specialm.estimate.flops import training_flops
from megatron_specialm.estimate.setup import Setup

Step = Callable[[], object]
LOSS_GAP = 0.01  # relative, the tolerance of tests/gpu


def beside_transformers(*, tiny: bool) -> Iterator[Figure]:
    """Tokens per second, MFU and peak memory. Ours run first: compilation may use up the time."""
    setups = {name: _setup(name, tiny=tiny) for name in ("slm-126m", "llm-771m")}
    speeds = {}
    with single_process():
        for name, setup in setups.items():
            title = f"{name}, ours"
            speeds[name] = yield from attempt(title, _measure(title, setup, _ours, tiny=tiny))
        for how, step_of in {"compiled": _compiled, "eager": _transformers}.items():
            for name, setup in setups.items():
                title = f"{name}, Transformers {how}"
                theirs = yield from attempt(title, _measure(title, setup, step_of, tiny=tiny))
                if theirs and (ours := speeds[name]):
                    yield Figure(f"{title}: ours to it", ours / theirs, "x")


def fp8_beside_bf16(*, tiny: bool) -> Iterator[Figure]:
    """Speed, and losses from the same first weights on the same batch; then the result of `specialm tune-precision`."""
    half, steps = _setup("llm-771m", tiny=tiny), 3 if tiny else 10
    with single_process():
        expected = _losses(half, steps)
        yield Figure("bf16: first loss", expected[0])
        yield Figure(f"bf16: loss after {steps} steps", expected[-1])
        yield from _measure("bf16", half, _ours, tiny=tiny)
        for recipe in RECIPES:
            low = replace(half, precision="fp8", fp8=Fp8Config(recipe=recipe))
            if reason := lacking(low, find_accelerator()):
                raise MachineError(str(reason))
            yield from attempt(f"FP8 {recipe}", _fp8(f"FP8 {recipe}", low, expected, tiny=tiny))
        yield from attempt("tune-precision", _tuning(low))


def _fp8(name: str, setup: Setup, expected: list[float], *, tiny: bool) -> Generator[Figure, None, None]:
    losses = _losses(setup, len(expected))
    gap = max(abs(loss - other) / other for loss, other in zip(losses, expected, strict=True))
    yield at_most(f"{name}: largest relative gap of losses to bf16", gap, LOSS_GAP)
    yield Figure(f"{name}: FP8 was used", str(losses != expected), good=losses != expected)
    yield from _measure(name, setup, _ours, tiny=tiny)


def _tuning(setup: Setup) -> Generator[Figure, None, None]:
    from megatron_specialm.model.tune_precision import advice, measure

    timings = measure(setup)
    for timing in timings:
        yield Figure(f"tune-precision, {setup.fp8.recipe}: {timing.shape.name}, FP8 to bf16", timing.ratio, "x")  # type: ignore[union-attr]
    print(f"  {advice(timings)}", flush=True)


def _setup(name: str, *, tiny: bool) -> Setup:
    if tiny:
        return Setup(preset("nano"), ParallelConfig(), "bf16", 300, 32, 4, 4)
    return Setup(preset(name), ParallelConfig(), "bf16", 32_000, 1024, 16, 16)


def _measure(
    name: str, setup: Setup, contender: Callable[[Setup], Step], *, tiny: bool
) -> Generator[Figure, None, float]:
    """Measure a step of one micro-batch, or of a smaller one if memory is short. Returns tokens per second."""

    def timed(size: int) -> float:
        step = contender(replace(setup, micro_batch_size=size, global_batch_size=size))
        return seconds_per_call(step, warmup=1, repeats=1, calls=1) if tiny else seconds_per_call(
            step, warmup=4, repeats=3, calls=5
        )  # fmt: skip

    seconds, size = with_smaller_batches(timed, setup.micro_batch_size)
    tokens = size * setup.context_length
    flops = tokens * training_flops(setup.model, setup.vocabulary_size, setup.context_length)
    mfu = utilisation(flops=flops, seconds=seconds, devices=1, device_name=name_of_device())
    yield Figure(f"{name}: step of {size} windows", seconds * 1e3, "ms")
    yield Figure(f"{name}: speed", tokens / seconds, "tokens/s")
    yield Figure(f"{name}: MFU", "unknown peak" if mfu is None else 100 * mfu, "" if mfu is None else "%")
    if torch.cuda.is_available():
        yield Figure(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    free()
    return tokens / seconds


def _losses(setup: Setup, steps: int) -> list[float]:
    free()
    engine, batch = engine_of(setup, first_weights=drawn_on_device), random_batch(setup)
    return [engine.train_step(batch, learning_rate=1e-4).loss.mean for _ in range(steps)]


def _ours(setup: Setup) -> Step:
    engine, batch = engine_of(setup, first_weights=drawn_on_device), random_batch(setup)
    return lambda: engine.train_step(batch, learning_rate=1e-4)


def _transformers(setup: Setup, compile_with: str | None = None) -> Step:
    """A handwritten training step: autocast to bf16, clipping, fused AdamW."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = huggingface_config(
        setup.model, vocabulary_size=setup.vocabulary_size, context_length=setup.context_length, eod=0
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    forward = torch.compile(model, backend=compile_with) if compile_with else model
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = random_batch(setup)
    tokens, targets = (torch.from_numpy(part).to(device) for part in (batch.tokens, batch.targets))

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            logits = forward(tokens, use_cache=False).logits
        functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def _compiled(setup: Setup) -> Step:
    """The same with torch.compile. On a CPU without code generation, which would take most of the time."""
    return _transformers(setup, "inductor" if torch.cuda.is_available() else "eager")
