"""Check the node that this process is on, before ranks start there. As a program, one process per node of a job:

usage: python -m megatron_specialm.slurm.node_check RESULT_FOLDER ADDRESS:PORT

It writes RESULT_FOLDER/NODE.json at the beginning and again at the end, so that a node that hangs differs from one that never
began. torch is imported only where there are GPUs or other nodes.

began              Unix time by this node's clock
alone, ended       seconds until the computations on this node alone, and until all had ended; missing before that
gpus               the number of GPUs that the driver reports
products           FLOP/s of matrix products by device, None where the result was wrong
bytes_per_second   of an all-reduce with the other nodes, None where its sum was wrong; missing where there are no others
error, joint_error of the computations on this node alone, and of those with the others
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_specialm.base.accelerator import find_accelerator
from megatron_specialm.base.environment import choose_gloo_interface, node_name
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.files import write_json
from megatron_specialm.base.stopwatch import Stopwatch


def check(path: Path, rendezvous: str) -> None:
    """Write the result to `path`.

    Args:
        rendezvous: address:port on the first node.
    """
    watch = Stopwatch()
    result: dict[str, Any] = {"began": time.time(), "gpus": find_accelerator().gpus, "products": {}}
    write_json(path, result)
    nodes = int(os.environ.get("SLURM_NTASKS", "1"))
    if result["gpus"] or nodes > 1:
        with _failure_as(result, "error"):
            _quick_doctor(path.parent)
            result["products"] = _products()
    result["alone"] = watch.seconds
    if nodes > 1:
        write_json(path, result)  # from here on it may wait for others
        with _failure_as(result, "joint_error"):
            result["bytes_per_second"] = _all_reduce(nodes, rendezvous)
    write_json(path, {**result, "ended": watch.seconds})


def _quick_doctor(folder: Path) -> None:
    """The quick form of `specialm doctor`.

    Raises:
        MachineError: something that training needs is missing or broken here.
    """
    from megatron_specialm.doctor.report import examine

    lacking = [finding for finding in examine(quick=True, folder=folder) if finding.needed and finding.state != "ok"]
    if lacking:
        raise MachineError("; ".join(f"{finding.name} is {finding.state}: {finding.detail}" for finding in lacking))


def _products() -> dict[str, float | None]:
    import torch

    from megatron_specialm.doctor.compute import product

    torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    found = {device: product(torch.device(device)) for device in devices}
    return {device: result["flops_per_second"] if result["right"] else None for device, result in found.items()}


def _all_reduce(nodes: int, rendezvous: str) -> float | None:
    import torch

    from megatron_specialm.doctor.compute import all_reduce

    choose_gloo_interface(f"tcp://{rendezvous}")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    result = all_reduce(device, rank=int(os.environ["SLURM_PROCID"]), ranks=nodes, rendezvous=f"tcp://{rendezvous}")
    return result["bytes_per_second"] if result["right"] else None


@contextlib.contextmanager
def _failure_as(result: dict[str, Any], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, it is a result
        result[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    # When a partition's GraceTime begins, Slurm sends it to ranks only: half a check would fail the node.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    check(Path(sys.argv[1]) / f"{node_name()}.json", sys.argv[2])
