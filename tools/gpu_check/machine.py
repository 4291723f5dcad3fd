"""What the figures were measured on."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch

from gpu_check.figures import Figure
from megatron_specialm.base.accelerator import find_accelerator, host_memory_bytes
from megatron_specialm.base.packages import installed_version

PACKAGES = ("transformer-engine", "megatron-core", "transformers", "triton", "numpy", "flash-attn", "apex")
GIB = 2**30


def describe(*, tiny: bool) -> Iterator[Figure]:
    """Software, host, and the GPU if there is one."""
    yield Figure("python", platform.python_version())
    yield Figure("torch", torch.__version__)
    for package in PACKAGES:
        yield Figure(package, installed_version(package) or "not installed")
    yield Figure("C compiler (torch.compile needs one)", shutil.which(os.environ.get("CC", "cc")) or "none")
    yield Figure("cores", len(os.sched_getaffinity(0)))
    yield Figure("host memory", host_memory_bytes() / GIB, "GiB")
    yield Figure("GPU, by the driver", find_accelerator().describe())
    yield Figure("CUDA of torch", torch.version.cuda or "none")
    if not torch.cuda.is_available():
        yield Figure("GPU, by torch", "none")
        return
    yield Figure("GPU, by torch", torch.cuda.get_device_name())
    yield Figure("driver", _driver())
    yield Figure("GPU memory", torch.cuda.get_device_properties(0).total_memory / GIB, "GiB")
    yield Figure("GPU memory, free", torch.cuda.mem_get_info()[0] / GIB, "GiB")
    yield Figure("cuDNN", str(torch.backends.cudnn.version()))
    yield Figure("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    yield Figure("Transformer Engine", _transformer_engine())


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"


def _transformer_engine() -> str:
    """Whether it can be imported: an installed one may be for another torch."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:
        return f"cannot be imported: {error}"
    return "can be imported"
