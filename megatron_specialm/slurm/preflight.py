"""The nodes of a job, before ranks start on them: each looks at itself (`node_check.py`), and is judged beside the others."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError, MachineError
from megatron_specialm.base.files import read_json
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.config.site import Preflight

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class _Answer:
    """What an answer has in any case, and of which types the rest is: see `node_check.py`."""

    began: float
    gpus: int
    products: dict[str, float | None]
    alone: float | None = None
    ended: float | None = None
    bytes_per_second: float | None = None
    error: str | None = None
    joint_error: str | None = None


def check_nodes(
    command: Sequence[str], folder: Path, *, nodes: Sequence[str], gpus: int, settings: Preflight
) -> dict[str, str]:
    """The nodes that are not fit, each with the reason.

    Args:
        command: starts `node_check` once on each node.
        folder: an empty one, for the nodes' answers.
        gpus: that each node is to show.

    Raises:
        MachineError: it is not for the nodes: the disk of the run folder is full, or nothing can be started.
    """
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < settings.free_disk:
        raise MachineError(
            f"{folder}: {free / 2**20:,.0f} MiB free, and {settings.free_disk / 2**20:,.0f} MiB are wanted "
            "(preflight.free_disk of the site profile): free space, and submit again"
        )
    began, watch = time.time(), Stopwatch()
    try:
        outcome = subprocess.run(command, timeout=settings.seconds, capture_output=True, text=True)
        said = " ".join(outcome.stderr.split())[-300:]
    except subprocess.TimeoutExpired:
        said = f"no answer within {settings.seconds:g} s"
    answers = {node: answer for node in nodes if (answer := _answer(folder / f"{node}.json")) is not None}
    if not answers:
        raise MachineError(f"preflight: no node answers: {said}")
    if bad := judge(answers, nodes=nodes, gpus=gpus, settings=settings, between=(began, began + watch.seconds)):
        return bad
    waiting = {node: "it waits for the others" for node, answer in answers.items() if "ended" not in answer}
    errors = {node: answer["joint_error"] for node, answer in answers.items() if "joint_error" in answer}
    if joint := [f"{node}: {error}" for node, error in {**waiting, **errors}.items()]:
        raise MachineError(f"preflight: the nodes cannot compute together: {'; '.join(joint)}")
    return {}


def judge(
    answers: Mapping[str, Answer], *, nodes: Sequence[str], gpus: int, settings: Preflight, between: tuple[float, float]
) -> dict[str, str]:  # fmt: skip
    """The nodes that are not fit, each with the reason: what each says of itself, and how it compares with the others.

    Args:
        between: Unix times by the first node's clock, before and after the nodes looked at themselves.
    """
    bad = {node: reason for node in nodes if (reason := _fault(answers.get(node), gpus, settings, between))}
    products = {node: answer["products"].values() for node, answer in answers.items() if node not in bad}
    fit = {node: min(speeds) for node, speeds in products.items() if speeds}
    for node, speed in fit.items():
        usual = statistics.median([other for name, other in fit.items() if name != node] or [speed])
        if speed * settings.slower_than < usual:
            bad[node] = f"its matrix products are {usual / speed:.1f} times slower than the others'"
    return bad


def _fault(answer: Answer | None, gpus: int, settings: Preflight, between: tuple[float, float]) -> str | None:
    """What a node's answer says against it."""
    if answer is None:
        return "it does not answer"
    if "alone" not in answer:
        return "its computations do not end"
    if answer["gpus"] < gpus:
        return f"it shows {answer['gpus']} GPUs of {gpus}"
    if wrong := [device for device, speed in answer["products"].items() if speed is None]:
        return f"matrix products on {', '.join(wrong)} are wrong"
    if answer.get("bytes_per_second", 0) is None:
        return "an all-reduce with the others gives a wrong sum"
    early = between[0] - answer["began"]
    late = answer["began"] + answer.get("ended", answer["alone"]) - between[1]
    if max(early, late) > settings.clock_seconds:
        return f"its clock differs by {max(early, late):.0f} s or more from the first node's"
    return answer.get("error")


def _answer(path: Path) -> Answer | None:
    try:
        read_json(path, _Answer)
        return read_json(path)
    except ArtifactError:
        return None
