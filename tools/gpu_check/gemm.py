"""Transformer Engine's matrix products against torch's, forward and backward: agreement and speed."""

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from gpu_check.figures import Figure, attempt, between
from gpu_check.training import RECIPES, preset, seconds_per_call
from megatron_specialm.base.accelerator import find_accelerator
from megatron_specialm.base.errors import MachineError
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.precision import Fp8Config
from megatron_specialm.estimate.capabilities import lacking
from megatron_specialm.estimate.setup import Setup

# Relative to the norm of the fp32 result. bf16 keeps 8 bits; E4M3 keeps 4; E5M2, for gradients, 3. Each rounds both factors,
# by about 0.04 and 0.06 in all. An error below the lower bound would mean that FP8 was not used.
BF16_ERRORS = ((0, 0.01), (0, 0.01), (0, 0.01))
FP8_ERRORS = ((0.01, 0.06), (0.01, 0.09), (0.01, 0.09))


class Product(NamedTuple):
    """(N, N) each: a linear's input, its weight, and the gradient of its output."""

    inputs: torch.Tensor
    weight: torch.Tensor
    gradient: torch.Tensor

    def exact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The result, the gradient of the inputs and of the weight, in fp32."""
        inputs, weight, gradient = (factor.float() for factor in self)
        return inputs @ weight.t(), gradient @ weight, gradient.t() @ inputs


def products(*, tiny: bool) -> Iterator[Figure]:
    """One square product in all number formats."""
    size, device = (64, "cpu") if not torch.cuda.is_available() else (256 if tiny else 8192, "cuda")
    generator = torch.Generator(device).manual_seed(0)
    product = Product(*(torch.randn(size, size, device=device, generator=generator).bfloat16() for _ in range(3)))
    linear = torch.nn.Linear(size, size, bias=False, device=device, dtype=torch.bfloat16)
    yield from _beside_exact("torch, bf16", linear, product, BF16_ERRORS)

    setup = Setup(preset("slm-126m"), ParallelConfig(), "fp8", 32_000, 1024, 16, 16)
    setups = {recipe: replace(setup, fp8=Fp8Config(recipe=recipe)) for recipe in RECIPES}
    for one in setups.values():
        if reason := lacking(one, find_accelerator()):
            raise MachineError(str(reason))
    yield from attempt("TE, bf16", _beside_exact("TE, bf16", _transformer_engine_linear(size), product, BF16_ERRORS))
    for recipe, one in setups.items():
        name = f"TE, FP8 {recipe}"
        yield from attempt(name, _beside_exact(name, _InFp8(size, one), product, FP8_ERRORS))


def _beside_exact(
    name: str, linear: Any, product: Product, bounds: tuple[tuple[float, float], ...]
) -> Generator[Figure, None, None]:
    with torch.no_grad():
        linear.weight.copy_(product.weight)
    inputs = product.inputs.clone().requires_grad_()
    output = linear(inputs)
    output.backward(product.gradient)
    found = output.detach(), inputs.grad, linear.weight.grad
    what = ("forward", "gradient of inputs", "gradient of weight")
    for place, result, expected, (low, high) in zip(what, found, product.exact(), bounds, strict=True):
        error = float((result.float() - expected).norm() / expected.norm())
        yield between(f"{name}: {place}, relative error", error, low, high)

    def one_pass() -> None:
        linear(inputs).backward(product.gradient)
        linear.weight.grad = inputs.grad = None

    rate = 3 * 2 * len(inputs) ** 3 / seconds_per_call(one_pass, warmup=3, repeats=5, calls=5)
    yield Figure(f"{name}: forward and backward", rate / 1e12, "TFLOP/s")


def _transformer_engine_linear(size: int) -> Any:
    import transformer_engine.pytorch as te  # not installed on every machine

    return te.Linear(size, size, bias=False, params_dtype=torch.bfloat16, device="cuda")


class _InFp8(torch.nn.Module):
    """A linear under FP8 with the recipe of a setup."""

    def __init__(self, size: int, setup: Setup) -> None:
        from megatron.core.fp8_utils import get_fp8_recipe

        from megatron_specialm.model.gpt import transformer_config

        super().__init__()
        self._linear = _transformer_engine_linear(size)
        self._recipe = get_fp8_recipe(
            transformer_config(
                setup.model, setup.vocabulary_size, precision="fp8", fp8=setup.fp8, parallel=setup.parallel
            )
        )

    @property
    def weight(self) -> Any:
        """The linear's."""
        return self._linear.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The linear's result."""
        import transformer_engine.pytorch as te

        with te.autocast(enabled=True, recipe=self._recipe):
            return self._linear(inputs)
