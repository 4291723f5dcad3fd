"""The GPUs of this machine, and the fused layers that are installed. Imports no torch and uses no GPU."""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.gpus import GIB, plannable_gpus
from megatron_specialm.base.packages import TRANSFORMER_ENGINE_LEAST, installed_version

SMI_SECONDS = 20.0  # a driver may have to initialize its GPUs
MIB = 2**20
USABLE = 0.92  # of a GPU's memory: the driver and NCCL take gigabytes, and what is freed leaves gaps


@dataclass(frozen=True)
class Accelerator:
    """The GPUs that this process may use. If they differ, `capability` and `memory_bytes` are the minimum.

    Without a GPU `name` is empty and `capability` None. `transformer_engine`: the installed version, or None.
    """

    name: str
    capability: tuple[int, int] | None
    transformer_engine: str | None
    gpus: int
    memory_bytes: int

    @property
    def has_fused_layers(self) -> bool:
        """Whether layers come from Transformer Engine, except in fp32."""
        return self.gpus > 0 and self.transformer_engine is not None

    @property
    def usable_bytes(self) -> int:
        """A GPU's memory for a training."""
        return int(USABLE * self.memory_bytes)

    def describe(self) -> str:
        """Short: `2 x NVIDIA H200 (compute capability 9.0)`, or `no GPU`."""
        if self.capability is None:
            return "no GPU"
        major, minor = self.capability
        return f"{self.gpus} x {self.name} (compute capability {major}.{minor})"


def host_memory_bytes() -> int:
    """This machine's memory, without that of GPUs."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def find_accelerator(environment: Mapping[str, str] = os.environ) -> Accelerator:
    """Ask the driver (nvidia-smi) and the installed packages. If the driver does not answer, there is no GPU."""
    rows = parse_gpus(_ask_driver(environment))
    transformer_engine = installed_version("transformer-engine")
    if not rows:
        return Accelerator("", None, transformer_engine, gpus=0, memory_bytes=0)
    name, capability, _ = min(rows, key=lambda row: row[1])
    memory_bytes = min(memory for _, _, memory in rows)
    return Accelerator(name, capability, transformer_engine, gpus=len(rows), memory_bytes=memory_bytes)


def planned_machine(name: str) -> Accelerator:
    """A node of GPUs of that model, with Transformer Engine, to plan for from elsewhere.

    Raises:
        ConfigError: the table has no such model.
    """
    models = {gpu.name: gpu for gpu in plannable_gpus()}
    if name not in models:
        raise ConfigError(f"gpu {name}: not known; known are {', '.join(models)}")
    gpu = models[name]
    assert gpu.memory_gib is not None and gpu.node is not None
    memory_bytes = gpu.memory_gib * GIB
    return Accelerator(name, gpu.capability, TRANSFORMER_ENGINE_LEAST, gpus=gpu.node.gpus, memory_bytes=memory_bytes)


def name_of_device() -> str:
    """The device that this process has used: the GPU, if it has imported torch and there is one, or the CPU."""
    torch = sys.modules.get("torch")  # without it no GPU was used
    if torch is not None and torch.cuda.is_available():
        name: str = torch.cuda.get_device_name()
        return name
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"cpu: {line.partition(':')[2].strip()}"
    return f"cpu: {platform.machine()}"


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    count = find_accelerator(environment).gpus
    named = environment.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def parse_gpus(table: str) -> list[tuple[str, tuple[int, int], int]]:
    """Name, compute capability and bytes of memory per line such as `name, 9.0, 143771` (MiB). Other lines, such as messages
    of nvidia-smi that there is no GPU, are skipped."""
    rows = []
    for line in table.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 2)]
        if len(fields) == 3 and fields[2].isdigit():
            major, _, minor = fields[1].partition(".")
            rows.append((fields[0], (int(major), int(minor)), int(fields[2]) * MIB))
    return rows


def _ask_driver(environment: Mapping[str, str]) -> str:
    command = shutil.which("nvidia-smi", path=environment.get("PATH", os.defpath))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if command is None or visible in ("", "-1"):
        return ""
    # nvidia-smi also lists hidden GPUs. It accepts the same numbers and names, except those of MIG instances.
    chosen = [f"--id={visible}"] if visible and not visible.startswith("MIG") else []
    query = ["--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            [command, *chosen, *query], capture_output=True, text=True, timeout=SMI_SECONDS, env=dict(environment)
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
