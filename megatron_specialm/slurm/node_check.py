"""A look at the node that this process is on, before ranks start there. As a program, one process per node of a job:

usage: python -m megatron_specialm.slurm.node_check ANSWER_FOLDER ADDRESS:PORT

It leaves ANSWER_FOLDER/NODE.json, at the beginning and again at the end, so that a node which hangs is told from one that never
began. torch is imported where there is something to compute on or with: GPUs, or other nodes.

began              Unix time by this node's clock
alone, ended       seconds after which it had computed alone, and had also computed with the others; what has not come yet is
                   missing
gpus               how many the driver shows
products           FLOP/s of matrix products by device, None where the result was wrong
bytes_per_second   of an all-reduce with the other nodes, None where its sum was wrong; missing where there are no others
error, joint_error what went wrong on this node alone, and in computing with the others
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


def look(path: Path, meeting: str) -> None:
    """Write the answer to `path`."""
    watch = Stopwatch()
    answer: dict[str, Any] = {"began": time.time(), "gpus": find_accelerator().gpus, "products": {}}
    write_json(path, answer)
    nodes = int(os.environ.get("SLURM_NTASKS", "1"))
    if answer["gpus"] or nodes > 1:
        with _failure_as(answer, "error"):
            _ask_the_doctor(path.parent)
            answer["products"] = _products()
    answer["alone"] = watch.seconds
    if nodes > 1:
        write_json(path, answer)  # from here on it may be others that it waits for
        with _failure_as(answer, "joint_error"):
            answer["bytes_per_second"] = _all_reduce(nodes, meeting)
    write_json(path, {**answer, "ended": watch.seconds})


def _ask_the_doctor(folder: Path) -> None:
    """The doctor's quick form.

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


def _all_reduce(nodes: int, meeting: str) -> float | None:
    import torch

    from megatron_specialm.doctor.compute import all_reduce

    choose_gloo_interface(f"tcp://{meeting}")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    result = all_reduce(device, rank=int(os.environ["SLURM_PROCID"]), ranks=nodes, meeting=f"tcp://{meeting}")
    return result["bytes_per_second"] if result["right"] else None


@contextlib.contextmanager
def _failure_as(answer: dict[str, Any], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, it tells of the node
        answer[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    # As a partition's GraceTime begins, Slurm sends it to ranks alone: half a look would speak against the node.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    look(Path(sys.argv[1]) / f"{node_name()}.json", sys.argv[2])
