"""Nodes before ranks start on them: what each says of itself, how they compare, and which are left out from then on."""

import multiprocessing
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.files import read_json, write_json
from megatron_specialm.base.lock import hold_folder
from megatron_specialm.config.site import Preflight
from megatron_specialm.slurm.nodes import (
    EXCLUDED_SECONDS,
    check_nodes,
    exclude_node,
    excluded_nodes,
    judge,
    nodes_to_exclude,
)
from tests.processes import free_port

ROOT = Path(__file__).parents[2]
SETTINGS = Preflight(seconds=120, free_disk=1)
FIT: dict[str, Any] = {
    "began": 100.0,
    "alone": 3.0,
    "ended": 5.0,
    "gpus": 2,
    "products": {"cuda:0": 6e14, "cuda:1": 6e14},
}


def _judged(**answers: dict[str, Any] | None) -> dict[str, str]:
    """What is said of the nodes whose answers differ from a fit one's as given."""
    found = {node: {**FIT, **changes} for node, changes in answers.items() if changes is not None}
    return judge(found, nodes=list(answers), gpus=2, settings=SETTINGS, between=(99.0, 106.0))


def test_fit_nodes() -> None:
    assert _judged(a={}, b={"bytes_per_second": 1e9}, c={"products": {"cuda:0": 4e14}}) == {}
    assert (
        judge({"a": {**FIT, "gpus": 0, "products": {}}}, nodes=["a"], gpus=0, settings=SETTINGS, between=(99, 106))
        == {}
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (None, "it does not answer"),
        ({"gpus": 1}, "it shows 1 GPUs of 2"),
        ({"products": {"cuda:0": None, "cuda:1": 6e14}}, "matrix products on cuda:0 are wrong"),
        ({"products": {"cuda:0": 6e14, "cuda:1": 2e14}}, "its matrix products are 3.0 times slower than the others'"),
        ({"bytes_per_second": None}, "an all-reduce with the others gives a wrong sum"),
        ({"began": 93.0}, "its clock differs by 6 s or more from the first node's"),
        ({"ended": 13.0}, "its clock differs by 7 s or more from the first node's"),
        ({"error": "RuntimeError: ECC"}, "RuntimeError: ECC"),
    ],
)
def test_each_fault_is_the_nodes_own(changes: dict[str, Any] | None, reason: str) -> None:
    assert _judged(a={}, b=changes, c={}) == {"b": reason}


def test_computations_that_do_not_end_are_not_held_against_those_who_wait() -> None:
    stuck = {name: FIT[name] for name in ("began", "gpus")} | {"products": {}}
    waits = {name: value for name, value in FIT.items() if name != "ended"}
    answers = {"a": waits, "b": stuck, "c": waits}
    found = judge(answers, nodes=list(answers), gpus=2, settings=SETTINGS, between=(99, 106))
    assert found == {"b": "its computations do not end"}


def _starting(tmp_path: Path) -> list[str]:
    """What srun does: node_check once on each of two nodes, here as two processes of this machine."""
    program = textwrap.dedent("""
        import os, subprocess, sys
        command = [sys.executable, "-m", "megatron_specialm.slurm.node_check", *sys.argv[1:]]
        started = []
        for rank, node in enumerate(("node1", "node2")):
            slurm = {"SLURMD_NODENAME": node, "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_CPUS_PER_TASK": "1"}
            started.append(subprocess.Popen(command, env={**os.environ, **slurm}))
        for process in started:
            process.wait()
    """)
    return [sys.executable, "-c", program, str(tmp_path / "nodes")]


@pytest.mark.slow
def test_two_nodes_compute_alone_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = Preflight(seconds=300, free_disk=1, slower_than=1000, clock_seconds=300)
    command = [*_starting(tmp_path), f"127.0.0.1:{free_port()}"]
    assert check_nodes(command, tmp_path / "nodes", nodes=["node1", "node2"], gpus=0, settings=settings) == {}
    for node in ("node1", "node2"):
        answer = read_json(tmp_path / "nodes" / f"{node}.json")
        assert answer["products"]["cpu"] > 0 and answer["bytes_per_second"] > 0
        assert 0 < answer["alone"] < answer["ended"] and "joint_error" not in answer and "error" not in answer


def test_a_third_node_that_says_nothing_is_named(tmp_path: Path) -> None:
    write = """
        import json, sys, time
        for node in ("node1", "node2"):
            answer = {"began": time.time(), "alone": 0.1, "ended": 0.2, "gpus": 0, "products": {"cpu": 1e9}}
            open(f"{sys.argv[1]}/{node}.json", "w").write(json.dumps(answer))
        open(f"{sys.argv[1]}/node3.json", "w").write("{")
    """
    command = [sys.executable, "-c", textwrap.dedent(write), str(tmp_path / "nodes")]
    found = check_nodes(command, tmp_path / "nodes", nodes=["node1", "node2", "node3"], gpus=0, settings=SETTINGS)
    assert found == {"node3": "it does not answer"}


def test_nodes_that_cannot_compute_together_are_not_blamed(tmp_path: Path) -> None:
    write = """
        import json, sys, time
        answer = {"began": time.time(), "alone": 0.1, "ended": 0.2}
        answer |= {"gpus": 0, "products": {}, "joint_error": "no route"}
        open(f"{sys.argv[1]}/node1.json", "w").write(json.dumps(answer))
    """
    command = [sys.executable, "-c", textwrap.dedent(write), str(tmp_path / "nodes")]
    with pytest.raises(MachineError, match="cannot compute together: node1: no route"):
        check_nodes(command, tmp_path / "nodes", nodes=["node1"], gpus=0, settings=SETTINGS)


def test_nodes_that_all_wait_for_each_other_are_not_blamed(tmp_path: Path) -> None:
    write = """
        import json, sys, time
        answer = {"began": time.time(), "alone": 0.1, "gpus": 0, "products": {}}
        open(f"{sys.argv[1]}/node1.json", "w").write(json.dumps(answer))
    """
    command = [sys.executable, "-c", textwrap.dedent(write), str(tmp_path / "nodes")]
    with pytest.raises(MachineError, match="cannot compute together: node1: it waits for the others"):
        check_nodes(command, tmp_path / "nodes", nodes=["node1"], gpus=0, settings=SETTINGS)


def test_what_is_not_for_the_nodes(tmp_path: Path) -> None:
    refused = [sys.executable, "-c", "import sys; sys.exit('srun: error: no such option')"]
    with pytest.raises(MachineError, match="no node answers: srun: error: no such option"):
        check_nodes(refused, tmp_path / "a", nodes=["n"], gpus=0, settings=SETTINGS)
    stuck = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(MachineError, match=r"no node answers: no answer within 0\.1 s"):
        check_nodes(stuck, tmp_path / "b", nodes=["n"], gpus=0, settings=Preflight(seconds=0.1, free_disk=1))
    with pytest.raises(MachineError, match=r"MiB free, .*preflight\.free_disk"):
        check_nodes(stuck, tmp_path / "c", nodes=["n"], gpus=0, settings=Preflight(free_disk=1 << 60))


def test_bad_nodes_are_left_out_for_a_day(tmp_path: Path) -> None:
    assert excluded_nodes(tmp_path / "none") == []
    for node in ("node9", "node1"):
        exclude_node(tmp_path, node, reason="slow")
    assert excluded_nodes(tmp_path) == ["node1", "node9"]
    entry = read_json(tmp_path / "nodes.json")["node9"]
    assert entry["reason"] == "slow"
    assert excluded_nodes(tmp_path, now=entry["time"] + EXCLUDED_SECONDS - 1) == ["node1", "node9"]
    assert excluded_nodes(tmp_path, now=entry["time"] + EXCLUDED_SECONDS + 60) == []
    assert excluded_nodes(tmp_path, now=entry["time"] - 7200) == ["node1", "node9"], "the clock was set back"
    assert excluded_nodes(tmp_path, now=entry["time"] - EXCLUDED_SECONDS - 60) == [], "it was a day ahead, or a year"


@pytest.mark.parametrize(("needed", "expected"), [(1, "cba"), (2, "cb"), (3, "c"), (4, ""), (5, "")])
def test_enough_nodes_are_left(tmp_path: Path, needed: int, expected: str) -> None:
    for node in "abc":
        exclude_node(tmp_path, node, reason="slow")
    assert nodes_to_exclude(tmp_path, lambda nodes: len({*"abcd"} - {*nodes}) >= needed) == list(expected)


def _find(folder: Path, ready: "multiprocessing.synchronize.Event") -> None:
    ready.set()
    exclude_node(folder, "node2", reason="slow")


def test_of_two_jobs_that_find_a_bad_node_neither_forgets_the_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    finder = context.Process(target=_find, args=(tmp_path, ready))
    with hold_folder(tmp_path):
        finder.start()
        assert ready.wait(60)
        time.sleep(0.5)  # for it to go wrong
        write_json(tmp_path / "nodes.json", {"node1": {"reason": "slow", "time": time.time()}})
    finder.join(60)
    assert excluded_nodes(tmp_path) == ["node1", "node2"]
