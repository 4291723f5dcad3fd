"""Which GPUs a machine has, and which fused layers are installed for them. Nothing here imports torch or uses a GPU."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SMI_SECONDS = 20.0  # a driver that has to wake up its GPUs takes some
MIB = 2**20


@dataclass(frozen=True)
class Accelerator:
    """The GPUs that this process may use. Where they differ, `capability` and `memory_bytes` are the least of them.

    `name` is empty and `capability` None where there is none; `transformer_engine` is its installed version, or None.
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

    def describe(self) -> str:
        """Short: `2 x NVIDIA H200 (compute capability 9.0)`, or `no GPU`."""
        if self.capability is None:
            return "no GPU"
        major, minor = self.capability
        return f"{self.gpus} x {self.name} (compute capability {major}.{minor})"


def host_memory_bytes() -> int:
    """All memory of this machine, GPUs' not counted."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def find_accelerator(environment: Mapping[str, str] = os.environ) -> Accelerator:
    """Ask the driver (nvidia-smi) and the list of installed packages. A driver that does not answer counts as no GPU."""
    rows = parse_gpus(_ask_driver(environment))
    transformer_engine = installed_version("transformer-engine")
    if not rows:
        return Accelerator("", None, transformer_engine, gpus=0, memory_bytes=0)
    name, capability, _ = min(rows, key=lambda row: row[1])
    memory_bytes = min(memory for _, _, memory in rows)
    return Accelerator(name, capability, transformer_engine, gpus=len(rows), memory_bytes=memory_bytes)


def name_of_device() -> str:
    """What this process has worked on: the GPU, if it has imported torch and there is one, or the processor."""
    torch = sys.modules.get("torch")  # who has not imported it has used no GPU
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
    """Name, compute capability and bytes of memory per line of `name, 9.0, 143771` (MiB). Lines of words, with which
    nvidia-smi says that there is no GPU, are none."""
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
    # nvidia-smi lists hidden GPUs too. It takes the same numbers and names, except those of parts of a GPU (MIG).
    chosen = [f"--id={visible}"] if visible and not visible.startswith("MIG") else []
    query = ["--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            [command, *chosen, *query], capture_output=True, text=True, timeout=SMI_SECONDS, env=dict(environment)
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def installed_version(package: str) -> str | None:
    """The version of a package that is installed, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
