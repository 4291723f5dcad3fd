"""What features need of the machine: its GPU, and installed packages."""

from megatron_specialm.base.accelerator import Accelerator
from megatron_specialm.base.packages import (
    DEEPSPEED,
    INSTALL_DEEPSPEED,
    INSTALL_TRANSFORMER_ENGINE,
    TRANSFORMER_ENGINE,
    installed_version,
    satisfies,
)
from megatron_specialm.config.precision import Fp8Config
from megatron_specialm.estimate.capability import Refusal
from megatron_specialm.estimate.setup import Setup

# The least compute capability per recipe: 8.9 is Ada, 9.0 is Hopper.
FP8_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
USE_BF16 = "use `precision: bf16`"


def fp8_of(setup: Setup) -> Fp8Config:
    """The FP8 settings of a setup that has some."""
    assert setup.fp8 is not None
    return setup.fp8


def lacks_fp8(setup: Setup, machine: Accelerator) -> Refusal | None:
    """Why a machine cannot run a setup's FP8 recipe."""
    recipe = fp8_of(setup).recipe
    needed, asked = FP8_CAPABILITY[recipe], f"fp8 with recipe {recipe}"
    if machine.capability is not None and machine.capability >= needed:
        return _lacks_transformer_engine(asked, machine, USE_BF16)
    other = "recipe: tensorwise, or " if (machine.capability or (0, 0)) >= FP8_CAPABILITY["tensorwise"] else ""
    return Refusal(
        f"{asked} needs a GPU of compute capability {needed[0]}.{needed[1]} or more, and this machine has "
        f"{machine.describe()}",
        f"{other}{USE_BF16}",
    )


def lacks_context_parallel(setup: Setup, machine: Accelerator) -> Refusal | None:
    """Why a machine has no attention over split sequences."""
    asked = f"context_parallel {setup.parallel.context_parallel}"
    otherwise = "set it to 1 and share the sequence with sequence_parallel"
    if machine.capability is None:
        return Refusal(f"{asked} needs GPUs with Transformer Engine, and this machine has no GPU", otherwise)
    if setup.precision == "fp32":
        reason = f"{asked} needs Transformer Engine's attention, which takes no fp32"
        return Refusal(reason, f"set precision: bf16, or {otherwise}")
    return _lacks_transformer_engine(asked, machine, otherwise)


def _lacks_transformer_engine(asked: str, machine: Accelerator, otherwise: str) -> Refusal | None:
    version = machine.transformer_engine
    if version is not None and satisfies(version, TRANSFORMER_ENGINE):
        return None
    found = f"version {version} is installed" if version else "it is not installed"
    reason = f"{asked} needs Transformer Engine {TRANSFORMER_ENGINE}, and {found}"
    return Refusal(reason, f"{INSTALL_TRANSFORMER_ENGINE}, or {otherwise}")


def lacks_deepspeed(_: Setup, __: Accelerator) -> Refusal | None:
    """Why there is no engine deepspeed: the package."""
    version = installed_version("deepspeed")
    if version is not None and satisfies(version, DEEPSPEED):
        return None
    found = f"version {version} is installed" if version else "it is not installed"
    return Refusal(
        f"engine deepspeed needs deepspeed {DEEPSPEED}, and {found}",
        f"{INSTALL_DEEPSPEED}, or set parallel.engine: megatron",
    )
