"""Findings about the machine: Python, cores, memory and disk; driver, MPI and Slurm from the output of their commands."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_specialm.base.environment import usable_cores
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.gpus import GIB
from megatron_specialm.doctor.finding import Finding
from megatron_specialm.doctor.process import Outcome

PYTHONS = ((3, 11), (3, 12))
DRIVER_REMEDY = (
    "on a machine with an NVIDIA GPU: apt install nvidia-driver; in a container: start it with the GPUs (--gpus all)"
)
MPI_REMEDY = "apt install openmpi-bin (only to start with mpirun)"
SLURM_REMEDY = "apt install slurm-client, and the cluster's slurm.conf (only on clusters)"


def python_finding(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Whether this Python is supported."""
    text = ".".join(map(str, version))
    if version[:2] in PYTHONS:
        return Finding("python", "ok", text)
    return Finding("python", "broken", text, "we need 3.11 or 3.12", "install Python 3.12, for example with uv")


def cores_finding() -> Finding:
    """Cores that this process may use."""
    present, usable = os.cpu_count() or 1, usable_cores()
    return Finding("cores", "ok", str(usable), "" if usable == present else f"of {present} in the machine")


def memory_finding(root: Path = Path("/")) -> Finding:
    """The machine's memory, and the limit of the container or job if that is smaller."""
    entries = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    total, available = (int(entries[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    detail = f"{available / GIB:.1f} GiB available"
    limit = min(_memory_limits(root), default=total)
    if limit < total:
        detail += f"; a cgroup (container or job) limits us to {limit / GIB:.1f} GiB"
    return Finding("memory", "ok", f"{total / GIB:.1f} GiB", detail)


def _memory_limits(root: Path) -> Iterator[int]:
    """The limits in bytes of this process's cgroup and its parents, of cgroup versions 1 and 2."""
    memberships = root / "proc/self/cgroup"
    for line in memberships.read_text().splitlines() if memberships.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path of the group may be the host's, and only the root of the mount may exist.
        inside = mount / group.lstrip("/")
        for folder in (inside, *inside.parents):
            limit = folder / name
            if folder.is_relative_to(mount) and limit.exists() and (text := limit.read_text().strip()) != "max":
                yield int(text)


def disk_finding(folder: Path) -> Finding:
    """The free space on a folder's disk."""
    usage = shutil.disk_usage(folder)
    return Finding("disk", "ok", f"{usage.free / GIB:.1f} GiB", f"free of {usage.total / GIB:.1f} GiB, current folder")


def driver_finding(smi: Outcome | None) -> Finding:
    """NVIDIA's driver, from the output of nvidia-smi (None: there is no such command).

    Raises:
        MachineError: nvidia-smi failed, hung, or names no driver.
    """
    if smi is None:
        return Finding("CUDA driver", "missing", detail="no nvidia-smi", remedy=DRIVER_REMEDY)
    text = smi.text()
    driver = re.search(r"(?:Driver|KMD) Version: *([\d.]+)", text)
    if driver is None:
        raise MachineError("nvidia-smi names no driver version")
    cuda = re.search(r"CUDA[\w ]* Version: *([\d.]+)", text)
    return Finding("CUDA driver", "ok", driver.group(1), f"for CUDA up to {cuda.group(1)}" if cuda else "")


def mpirun_finding(outcome: Outcome | None) -> Finding:
    """The MPI launcher, from its `--version`.

    Raises:
        MachineError: it failed or hung.
    """
    if outcome is None:
        return Finding("mpirun", "missing", remedy=MPI_REMEDY)
    # `mpirun (Open MPI) 4.1.4`; Hydra's (MPICH, Intel) has `Version: 4.0.2` on its second line
    name = outcome.text().partition("\n")[0].strip()
    version = re.search(r"\d+(?:\.\d+)+", outcome.text())
    return Finding("mpirun", "ok", version.group() if version else "", name)


def slurm_finding(sinfo: Outcome | None, srun: Outcome | None, partitions: Outcome | None) -> Finding:
    """Slurm's commands, from their `--version`, and whether its controller lists partitions and their nodes.

    Raises:
        MachineError: a command failed or hung.
    """
    if sinfo is None or partitions is None:
        return Finding("slurm", "missing", remedy=SLURM_REMEDY)
    version = sinfo.text().removeprefix("slurm-wlm").removeprefix("slurm").strip()
    if srun is None:
        return Finding("slurm", "broken", version, "sinfo is there, srun is not", SLURM_REMEDY)
    started = srun.text().removeprefix("slurm-wlm").removeprefix("slurm").strip()
    if started != version:
        return Finding("slurm", "broken", version, f"srun is of another version: {started}", SLURM_REMEDY)
    if partitions.error:
        detail = f"no controller answers: {partitions.error}"
        return Finding("slurm", "broken", version, detail, "start slurmctld, or ask the cluster's administrator")
    rows = [line.split() for line in partitions.text().splitlines()]
    nodes = sum(int(count) for _, count in rows)
    return Finding("slurm", "ok", version, f"a controller answers: {len(rows)} partition(s), {nodes} node(s) in them")
