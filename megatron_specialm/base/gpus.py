"""The one table of GPUs: peak speed, compute capability and memory of each model."""

from collections.abc import Iterator
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        name: a part of the driver's device name.
        dense_peak: bf16 matrix products with fp32 accumulation, in FLOP/s, without sparsity (which vendors often quote, and
            which doubles the number).
        capability: CUDA compute capability.
        memory_gib: as the driver reports it; None if unknown: then `--gpu` does not accept the model.
    """

    name: str
    dense_peak: float
    capability: tuple[int, int]
    memory_gib: int | None = None


# A device is of the first model whose name is in its own: a longer name comes before its prefix.
GPUS = (
    Gpu("GB200", 2.5e15, (10, 0)),
    Gpu("B200", 2.25e15, (10, 0), 178),
    Gpu("H200", 989e12, (9, 0), 140),
    Gpu("H100 PCIe", 756e12, (9, 0)),
    Gpu("H100", 989e12, (9, 0), 79),
    Gpu("A100", 312e12, (8, 0), 79),
    Gpu("L40S", 362e12, (8, 9), 44),
    Gpu("A10", 125e12, (8, 6)),
    Gpu("V100", 125e12, (7, 0)),
)


def plannable_gpus() -> Iterator[Gpu]:
    """The models that a config can be checked for on another machine."""
    return (gpu for gpu in GPUS if gpu.memory_gib is not None)


def dense_peak(device_name: str) -> float | None:
    """The peak in FLOP/s of a device by its name; None if the table does not have it, and for CPUs."""
    return next((gpu.dense_peak for gpu in GPUS if gpu.name in device_name), None)


def utilisation(*, flops: float, seconds: float, devices: int, device_name: str) -> float | None:
    """Model FLOPs utilisation (MFU) in [0, 1]: the model's FLOPs, without recomputation, over the devices' dense peak. None for
    devices that are not in the table."""
    peak = dense_peak(device_name)
    return None if peak is None else flops / (seconds * devices * peak)
