"""Number formats of a training: what they are called in Megatron-Core, and what FP8 asks of machine and model.

Under FP8 the layers' linears multiply FP8 numbers. Weights, gradients, norms, attention and the output layer stay bf16,
the optimizer's copies of the weights fp32.
"""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from megatron_specialm.config.base import Settings

Precision = Literal["fp32", "bf16", "fp8"]
Linear = Literal["qkv", "proj", "fc1", "fc2"]
LINEARS: tuple[Linear, ...] = ("qkv", "proj", "fc1", "fc2")


class Fp8Config(Settings):
    """How numbers are scaled into FP8's narrow range, and which layers are left out.

    `tensorwise`: each tensor by its present maximum. `delayed`: by the maximum of the last 1,024 steps, which saves a
    pass over the tensor; this history is no part of a checkpoint. `blockwise`: each 128 numbers (128 x 128 of a weight)
    by their own maximum.
    """

    recipe: Literal["delayed", "tensorwise", "blockwise"] = "tensorwise"
    format: Literal["hybrid", "e4m3"] = Field(
        default="hybrid", description="hybrid: gradients in E5M2 (wider range), all else in E4M3 (finer)"
    )
    linears: tuple[Linear, ...] = Field(
        default=LINEARS,
        min_length=1,
        strict=False,
        description="those in FP8, the others bf16: `specialm tune-precision` finds them",
    )
    bf16_first_layers: NonNegativeInt = Field(default=0, description="so many first layers stay bf16")
    bf16_last_layers: NonNegativeInt = Field(default=0, description="so many last layers stay bf16")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.recipe == "delayed" and (self.bf16_layers or len(set(self.linears)) < len(LINEARS)):
            raise ValueError(
                f"recipe delayed takes all layers and linears, and linears is {list(self.linears)}, bf16_first_layers "
                f"{self.bf16_first_layers}, bf16_last_layers {self.bf16_last_layers}: leave them out, or use "
                "recipe: tensorwise"
            )
        return self

    @property
    def bf16_layers(self) -> int:
        """How many layers stay bf16."""
        return self.bf16_first_layers + self.bf16_last_layers


def megatron_settings(precision: Precision, fp8: Fp8Config | None) -> dict[str, Any]:
    """Keyword arguments of Megatron-Core's `TransformerConfig`."""
    assert (precision == "fp8") == (fp8 is not None), "an Fp8Config goes with precision fp8, and with no other"
    if fp8 is None:
        return {"bf16": precision == "bf16"}
    return {
        "bf16": True,
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        # Transformer Engine's own defaults. Megatron-Core's look one step back only.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": fp8.bf16_layers > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
        "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
    }
