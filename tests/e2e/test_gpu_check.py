"""tools/gpu_check.sh in small: every part runs, and what goes wrong in one costs only that one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.conftest import ROOT

SCRIPT = ROOT / "tools" / "gpu_check.sh"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable}
PARTS = ["machine", "gemm", "logits", "tests", "mfu", "fp8", "projected", "moe", "packed", "memory", "text"]
FOR_FP8 = {"gemm", "fp8", "memory", "text"}


def _check(out: Path, *options: str) -> tuple[int, dict[str, dict], str]:
    """The exit code, the records by part, and what was printed."""
    done = subprocess.run([SCRIPT, "--tiny", *options, out], capture_output=True, text=True, env=ENVIRONMENT, cwd="/")
    return done.returncode, _records(out), done.stdout + done.stderr


def _records(out: Path) -> dict[str, dict]:
    return {part["name"]: part for part in json.loads((out / "gpu_check.json").read_text())["parts"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused here is what a CPU cannot do")
def test_every_part_runs_in_small(tmp_path: Path) -> None:
    code, records, printed = _check(tmp_path, "--budget", "800", *(f"--limit={name}=400" for name in PARTS))
    assert code == 0, printed
    assert list(records) == PARTS
    table = (tmp_path / "gpu_check.txt").read_text()
    for name, record in records.items():
        assert record["status"] == ("not possible here" if name in FOR_FP8 else "done"), (name, record)
        assert record["figures"] and record["started"] <= record["ended"], name
        assert all(figure["name"] in table for figure in record["figures"])
        if name in FOR_FP8:
            assert "fp8 with recipe" in record["reason"] and "use `precision: bf16`" in record["reason"]
    packed = {figure["name"]: figure for figure in records["packed"]["figures"]}
    assert packed["slm-126m fp32, packed: gap of losses to none"]["good"]
    assert packed["slm-126m bf16, packed: gap of gradient norms"]["good"]
    fills = [packed[f"slm-126m bf16, {packing}: fill"]["value"] for packing in ("none", "sorted", "packed")]
    assert fills == sorted(fills) and fills[0] < 0.6 and fills[2] == 1
    losses = {figure["name"]: figure["value"] for figure in records["text"]["figures"]}
    assert losses["fp32: loss at step 0"] == pytest.approx(losses["bf16: loss at step 0"], rel=1e-2)


def test_a_part_over_its_time_costs_only_itself(tmp_path: Path) -> None:
    code, records, printed = _check(
        tmp_path, "--parts", "gemm,machine", "--limit", "machine=0.3", "--limit", "gemm=200"
    )
    assert code == 1, printed
    assert records["machine"]["status"] == "out of time"
    assert records["gemm"]["status"] in ("done", "not possible here") and records["gemm"]["figures"]


def test_what_finds_no_time_is_not_begun(tmp_path: Path) -> None:
    code, records, _ = _check(tmp_path, "--budget", "2")
    assert code == 1
    assert {record["status"] for record in records.values()} == {"not run"}
    assert all(record["reason"].startswith("no time") for record in records.values())


def test_a_part_that_is_killed_costs_only_itself_and_a_killed_command_leaves_what_it_knew(tmp_path: Path) -> None:
    command = [SCRIPT, "--tiny", "--parts", "machine,gemm,text", tmp_path]
    with (tmp_path / "printed").open("w") as printed:
        process = psutil.Popen(command, env=ENVIRONMENT, stdout=printed, stderr=printed)
    try:
        _only_child(process, "machine").kill()
        _wait_for(lambda: _records(tmp_path)["gemm"]["figures"])
        text = _only_child(process, "text")
    finally:
        process.kill()
        process.wait()
    records = _records(tmp_path)
    assert (records["machine"]["status"], records["machine"]["exit_code"]) == ("failed", -9)
    assert records["gemm"]["status"] in ("done", "not possible here")
    assert records["text"]["status"] == "running"
    text.wait(30)  # nothing is left that would hold the GPU


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, "--parts", "mfu,gem", tmp_path], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "no part 'gem'; parts are machine, gemm" in done.stderr


def _only_child(process: psutil.Process, part: str) -> psutil.Process:
    def found() -> list[psutil.Process]:
        return [child for child in process.children() if part in child.cmdline()]

    _wait_for(found)
    return found()[0]


def _wait_for(condition, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (FileNotFoundError, psutil.Error):  # not there yet, or just gone
            pass
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.05)
