"""Short computations that show whether a device works and how fast. As a program, each in its own process:

usage: python -m megatron_specialm.doctor.compute gpus
       python -m megatron_specialm.doctor.compute product DEVICE
       python -m megatron_specialm.doctor.compute all-reduce DEVICE RANK RANKS RENDEZVOUS_FILE
"""

import datetime
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist

from megatron_specialm.doctor.process import send_answer

GPU_SECONDS, CPU_SECONDS = 1.5, 0.3
GPU_SIZE, CPU_SIZE = 8192, 1024
CORNER = 16  # rows and columns of a product that are checked
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
GPU_BYTES, CPU_BYTES = 2**28, 2**24
ROUNDS, WARMUP_ROUNDS = 10, 3
PATTERN = 1021  # a prime, so that all chunks of a ring differ
RENDEZVOUS_TIMEOUT = datetime.timedelta(seconds=60)


def gpus() -> dict[str, Any]:
    """The GPUs that torch finds, with bytes of memory, and its first warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = []
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            found.append({"name": name, "architecture": f"sm_{major}{minor}", "free": free, "total": total})
    return {"gpus": found, "warning": str(caught[0].message) if caught else ""}


def product(device: torch.device) -> dict[str, Any]:
    """Square matrix products for about a second: bf16 on a GPU, fp32 on the CPU.

    Returns:
        flops_per_second, and whether the corner of the result agrees with the same product on the CPU.
    """
    on_gpu = device.type == "cuda"
    size, dtype, seconds = (GPU_SIZE, torch.bfloat16, GPU_SECONDS) if on_gpu else (CPU_SIZE, torch.float32, CPU_SECONDS)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    result = left @ right
    expected = left[:CORNER].cpu().double() @ right[:, :CORNER].cpu().double()
    error = (result[:CORNER, :CORNER].cpu().double() - expected).norm() / expected.norm()
    _synchronize(device)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(ROUNDS):
            torch.matmul(left, right, out=result)
        _synchronize(device)
        count += ROUNDS
    # `not >` would let a NaN pass
    return {"flops_per_second": 2 * size**3 * count / elapsed, "right": bool(error <= TOLERANCE[dtype])}


def all_reduce(device: torch.device, *, rank: int, ranks: int, rendezvous: str) -> dict[str, Any]:
    """Sum a tensor over processes.

    Args:
        rendezvous: an `init_method` of torch.distributed.

    Returns:
        whether every element of the sum is right, and bytes per second over each process's link (bus bandwidth:
        2 (ranks - 1) / ranks times the tensor, as NCCL's own tests count).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=ranks, timeout=RENDEZVOUS_TIMEOUT)
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    pattern = (torch.arange(size // 4, device=device) % PATTERN).float()
    values = pattern + rank
    dist.all_reduce(values)
    right = torch.equal(values, ranks * pattern + ranks * (ranks - 1) / 2)
    values.zero_()
    for round_number in range(WARMUP_ROUNDS + ROUNDS):
        if round_number == WARMUP_ROUNDS:
            _synchronize(device)
            start = time.perf_counter()
        dist.all_reduce(values)
    _synchronize(device)
    seconds = time.perf_counter() - start
    dist.destroy_process_group()
    return {"right": right, "bytes_per_second": 2 * (ranks - 1) / ranks * size * ROUNDS / seconds}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(check: str, *arguments: str) -> dict[str, Any]:
    if check == "gpus":
        return gpus()
    device = torch.device(arguments[0])
    if check == "product":
        return product(device)
    rank, ranks, rendezvous = arguments[1:]
    return all_reduce(device, rank=int(rank), ranks=int(ranks), rendezvous=f"file://{rendezvous}")


if __name__ == "__main__":
    send_answer(lambda: main(*sys.argv[1:]))
