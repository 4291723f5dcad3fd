"""Findings about GPUs, fused kernels and computations, from the results of child processes."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.gpus import GIB, dense_peak
from megatron_specialm.base.temporary import short_place
from megatron_specialm.doctor.finding import Finding, guarded, one_line
from megatron_specialm.doctor.machine import DRIVER_REMEDY
from megatron_specialm.doctor.packages import PACKAGES
from megatron_specialm.doctor.process import Outcome, start_module, wait_all

COMPUTE_SECONDS = 120.0
GLOO_PROCESSES = 2
TORCH_REMEDY = "install torch for a CUDA that the driver supports: pytorch.org/get-started"
NCCL_REMEDY = "it comes with torch's CUDA builds (not needed on the CPU): pytorch.org/get-started"


def nccl_finding(torch_facts: Mapping[str, Any]) -> Finding:
    """The NCCL of torch.

    Raises:
        MachineError: torch cannot be used.
    """
    if not torch_facts:
        raise MachineError("unknown without torch")
    if torch_facts["nccl"]:
        return Finding("NCCL", "ok", torch_facts["nccl"], "torch's")
    return Finding("NCCL", "missing", detail="torch has none", remedy=NCCL_REMEDY)


def find_gpus(
    torch_facts: Mapping[str, Any], driver: Finding, environment: Mapping[str, str]
) -> tuple[list[str], list[Finding]]:
    """The names of the GPUs that torch finds, and their findings."""
    seen: dict[str, Any] = {"gpus": [], "warning": torch_facts.get("detail", "it cannot be used")}
    if torch_facts.get("cuda"):  # otherwise there are none, and no other import is needed
        try:
            with start_module("compute", "gpus", environment=environment) as process:
                seen = process.wait().answer()
        except MachineError as error:
            return [], [Finding("GPU", "broken", detail=str(error), remedy=TORCH_REMEDY)]
    return [gpu["name"] for gpu in seen["gpus"]], gpu_findings(seen, driver, environment)


def gpu_findings(seen: Mapping[str, Any], driver: Finding, environment: Mapping[str, str]) -> list[Finding]:
    """A finding per GPU, or one finding that explains why there is none. `seen`: the result of `compute.gpus`."""
    if seen["gpus"]:
        return [
            Finding(
                f"GPU {index}",
                "ok",
                gpu["architecture"],
                f"{gpu['name']}, {gpu['free'] / GIB:.1f} of {gpu['total'] / GIB:.1f} GiB free",
            )
            for index, gpu in enumerate(seen["gpus"])
        ]
    if driver.state != "ok":
        return [Finding("GPU", "missing", detail="runs use the CPU", remedy=DRIVER_REMEDY)]
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return [
            Finding("GPU", "missing", detail=f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", remedy="unset this variable")
        ]
    warning = one_line(seen["warning"]) or "it does not say why"
    return [Finding("GPU", "broken", detail=f"the driver is there, torch sees no GPU: {warning}", remedy=TORCH_REMEDY)]


def fused_finding(megatron_facts: Mapping[str, Any], gpus: int) -> Finding:
    """Which fused layers and optimizer Megatron-Core would use.

    Raises:
        MachineError: Megatron-Core cannot be imported.
    """
    if not megatron_facts:
        raise MachineError("unknown without Megatron-Core")
    source = "transformer-engine" if megatron_facts["have_te"] else "apex" if megatron_facts["have_apex"] else "none"
    adam = f"Adam from {megatron_facts['adam']}"
    if source == "none":
        remedy = PACKAGES["transformer-engine"].remedy
        return Finding("fused layers", "missing", source, f"Megatron-Core's own layers, {adam}", remedy)
    if gpus == 0:
        # They are not used on a CPU (`model/cpu.py`).
        return Finding("fused layers", "missing", "none", f"{source} is there, a GPU for it is not; Adam from torch")
    return Finding("fused layers", "ok", source, adam)


def product_finding(name: str, outcome: Outcome, device_name: str) -> Finding:
    """The speed of matrix products on a device, compared with its dense peak.

    Raises:
        MachineError: the process failed, or the product is wrong.
    """
    answer = outcome.answer()
    if not answer["right"]:
        raise MachineError("the product is wrong")
    speed = answer["flops_per_second"]
    if name == "product cpu":
        return Finding(name, "ok", detail=f"{speed / 1e9:,.0f} GFLOP/s in fp32")
    peak = dense_peak(device_name)
    share = (
        f", {speed / peak:.0%} of the dense peak of {peak / 1e12:,.0f}" if peak else ", its peak is not in our table"
    )
    return Finding(name, "ok", detail=f"{speed / 1e12:,.0f} TFLOP/s in bf16{share}")


def all_reduce_finding(backend: str, outcomes: list[Outcome]) -> Finding:
    """Whether the ranks' sums are correct, and the slowest rank's bandwidth.

    Raises:
        MachineError: a process failed, or a sum is wrong.
    """
    answers = [outcome.answer() for outcome in outcomes]
    if not all(answer["right"] for answer in answers):
        raise MachineError(f"{backend}: the sum is wrong")
    speed = min(answer["bytes_per_second"] for answer in answers)
    return Finding("all-reduce", "ok", backend, f"{len(answers)} processes, the sum is right, {speed / 1e9:.1f} GB/s")


def compute_findings(gpu_names: list[str], environment: Mapping[str, str]) -> Iterator[Finding]:
    """Compute on the CPU, on all GPUs at the same time (as training does), and between processes."""
    yield from _products({"product cpu": ("cpu", "cpu")}, environment)
    devices = {f"product GPU {index}": (f"cuda:{index}", name) for index, name in enumerate(gpu_names)}
    yield from _products(devices, environment)
    backend = "nccl" if len(gpu_names) > 1 else "gloo"
    yield guarded("all-reduce", lambda: _all_reduce(backend, len(gpu_names), environment), needed=True)


def _products(devices: Mapping[str, tuple[str, str]], environment: Mapping[str, str]) -> Iterator[Finding]:
    with contextlib.ExitStack() as stack:
        started = {
            name: stack.enter_context(
                start_module("compute", "product", device, environment=environment, seconds=COMPUTE_SECONDS)
            )
            for name, (device, _) in devices.items()
        }
        for name, process in started.items():
            yield guarded(name, partial(product_finding, name, process.wait(), devices[name][1]), needed=True)


def _all_reduce(backend: str, gpus: int, environment: Mapping[str, str]) -> Finding:
    devices = [f"cuda:{index}" for index in range(gpus)] if backend == "nccl" else ["cpu"] * GLOO_PROCESSES
    with tempfile.TemporaryDirectory(dir=short_place()) as folder, contextlib.ExitStack() as stack:
        rendezvous = str(Path(folder) / "rendezvous")
        processes = [
            stack.enter_context(
                start_module(
                    "compute", "all-reduce", device, str(rank), str(len(devices)), rendezvous,
                    environment=environment, seconds=COMPUTE_SECONDS,
                )
            )
            for rank, device in enumerate(devices)
        ]  # fmt: skip
        return all_reduce_finding(backend, wait_all(processes))
