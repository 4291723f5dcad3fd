"""The one table of GPUs: peak speed, compute capability and memory of each model, and the nodes that have them.

Sources: the vendor's data sheets of each GPU (without sparsity; half of NVLink's figures, which are of both directions
together), and for nodes NVIDIA's DGX A100, H100, H200 and B200 user guides and its reference architecture of L40S nodes
(2-8-5-200).
"""

from collections.abc import Iterator
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Node:
    """A node of equal GPUs. Bandwidths are of one GPU, in bytes/s in each direction.

    Attributes:
        link: to the node's other GPUs: NVLink, or PCIe.
        fabric: to other nodes: its share of the node's network cards.
        host: to the node's memory: PCIe.
    """

    gpus: int
    link: float
    fabric: float
    host: float


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        name: a part of the driver's device name.
        dense_peak: bf16 matrix products with fp32 accumulation, in FLOP/s, without sparsity (which vendors often quote, and
            which doubles the number).
        capability: CUDA compute capability.
        memory_gib: as the driver reports it; None if unknown: then `--gpu` does not accept the model.
        fp32_peak: fp32 products without tensor cores, in FLOP/s.
        bandwidth: of its memory, in bytes/s, read plus written.
    """

    name: str
    dense_peak: float
    capability: tuple[int, int]
    memory_gib: int | None = None
    fp32_peak: float = 0.0
    bandwidth: float = 0.0
    node: Node | None = None


DGX_H100 = Node(gpus=8, link=450e9, fabric=50e9, host=64e9)  # NVLink 4, one ConnectX-7 (400 Gb/s) per GPU, PCIe 5
DGX_B200 = Node(gpus=8, link=900e9, fabric=50e9, host=64e9)
DGX_A100 = Node(gpus=8, link=300e9, fabric=25e9, host=32e9)
PCIE_L40S = Node(gpus=8, link=32e9, fabric=25e9, host=32e9)

# A device is of the first model whose name is in its own: a longer name comes before its prefix.
GPUS = (
    Gpu("GB200", 2.5e15, (10, 0)),
    Gpu("B200", 2.25e15, (10, 0), 178, 80e12, 8e12, DGX_B200),
    Gpu("H200", 989e12, (9, 0), 140, 67e12, 4.8e12, DGX_H100),
    Gpu("H100 PCIe", 756e12, (9, 0)),
    Gpu("H100", 989e12, (9, 0), 79, 67e12, 3.35e12, DGX_H100),
    Gpu("A100", 312e12, (8, 0), 79, 19.5e12, 2.04e12, DGX_A100),
    Gpu("L40S", 362e12, (8, 9), 44, 91.6e12, 0.864e12, PCIE_L40S),
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
