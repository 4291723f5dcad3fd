"""Ranks under a launcher: the first one plans, for as long as it takes, and the others look at nothing before."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_specialm.base.environment import discover_world
from megatron_specialm.base.rendezvous import rendezvous
from megatron_specialm.graph.plan import write_resolved
from megatron_specialm.run.inline import lead
from tests.conftest import ROOT
from tests.processes import free_port
from tests.run_folder import Run, make_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = make_run(tmp_path, monkeypatch)
    write_resolved(made.pipeline, made.root)
    return made


def _of_rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "SPECIALM_RENDEZVOUS_SECONDS": "60"}


@pytest.fixture
def place() -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _start(rank: int, place: Mapping[str, str], *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_specialm", "run", "config.yaml", *options], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **place, **_of_rank(rank)},
    )  # fmt: skip


def test_nobody_plans_before_the_first(run: Run, place: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the first rank is this process, and the text comes while it plans."""
    text = Path(next(iter(run.plan.values())).task.files["train"][0])
    text.rename(aside := text.with_name("aside"))
    for name, value in {**place, **_of_rank(0)}.items():
        monkeypatch.setenv(name, value)
    other = _start(1, place)
    try:
        world = discover_world()
        rendezvous(world)
        aside.rename(text)
        lead({name: replace(planned, state="done") for name, planned in run.plan.items()}, world)
        said, _ = other.communicate(timeout=100)
    finally:
        other.kill()
        other.wait()
    assert other.returncode == 0, said


def test_where_the_first_refuses_the_others_end_and_say_so(run: Run, place: dict[str, str]) -> None:
    ranks = [_start(rank, place, "--only", "slm") for rank in (0, 1)]
    (first, other) = (process.communicate(timeout=100)[0] for process in ranks)
    assert [process.returncode for process in ranks] == [2, 4]
    assert "which is to do: run that first" in first, first
    assert "rank 0 has ended and has not planned" in other and "Traceback" not in other, other
