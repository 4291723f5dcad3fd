"""What the time of a step depends on beside the layout: the rates that a training reaches on the parts of a machine."""

from dataclasses import dataclass

from megatron_specialm.base.gpus import plannable_gpus
from megatron_specialm.config.precision import Precision

# The fractions of a data sheet's figures that a training reaches, and the times that no data sheet has. Assumed, not measured.
PRODUCTS = 0.7  # of the peak, in matrix products
ATTENTION = 0.35  # of the peak, in attention: FlashAttention-2 on an H100 (arXiv 2407.08608)
MEMORY = 0.8  # of the memory's bandwidth
LINK = 0.8  # of NVLink: an H100 sends 376 of 450 GB/s to another (github.com/NVIDIA/nccl/issues/1264)
FABRIC = 0.8
HOST = 0.8
LAUNCH = 10e-6  # s, for the host to start a kernel
COLLECTIVE = 20e-6  # s, of a collective or a message without bytes


@dataclass(frozen=True)
class Hardware:
    """Equal machines, at the rates of one process (one GPU). Bytes per second are in each direction.

    Attributes:
        products: matrix products, in FLOP/s.
        attention: scores, softmax and weighted sum, in the FLOP/s of its products (`attention_flops`).
        memory: what other operations read and write, in bytes/s.
        link: to other processes of the same node.
        fabric: to processes of other nodes.
        host: from GPU to host memory.
        per_node: processes of a node.
        launch: seconds to start a kernel.
        collective: seconds of a collective or message without bytes.
    """

    products: float
    attention: float
    memory: float
    link: float
    fabric: float
    host: float
    per_node: int
    launch: float
    collective: float

    def message_rate(self, ranks: int) -> float:
        """Bytes/s of each process to others, of so many consecutive ranks."""
        return self.link if ranks <= self.per_node else self.fabric

    def ring_rate(self, members: int, apart: int) -> float:
        """Bytes/s of each process in a sum or gathering over so many, whose ranks are so far apart. Across nodes, the members
        in a node use its network cards together: what they have in common leaves the node once."""
        in_node = max(1, self.per_node // apart)
        return self.link if members <= in_node else min(self.link, in_node * self.fabric)


def hardware_of(model: str, precision: Precision) -> Hardware:
    """Nodes of a GPU model that `--gpu` accepts. FP8 is counted as bf16: its gain depends on the sizes of matrices
    (`specialm tune-precision`)."""
    gpu = next(gpu for gpu in plannable_gpus() if gpu.name == model)
    assert gpu.node is not None
    peak = gpu.fp32_peak if precision == "fp32" else gpu.dense_peak
    return Hardware(
        products=PRODUCTS * peak,
        attention=ATTENTION * peak,
        memory=MEMORY * gpu.bandwidth,
        link=LINK * gpu.node.link,
        fabric=FABRIC * gpu.node.fabric,
        host=HOST * gpu.node.host,
        per_node=gpu.node.gpus,
        launch=LAUNCH,
        collective=COLLECTIVE,
    )


def assumptions() -> str:
    """What is assumed, in words."""
    return (
        f"assumed, not measured: {PRODUCTS:.0%} of peak FLOP/s in matrix products, {ATTENTION:.0%} in attention, "
        f"{MEMORY:.0%} of memory bandwidth, {LINK:.0%} of NVLink, {FABRIC:.0%} of the fabric; {LAUNCH * 1e6:.0f} us per "
        f"kernel launch and {COLLECTIVE * 1e6:.0f} us per collective"
    )
