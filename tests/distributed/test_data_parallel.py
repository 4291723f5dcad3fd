"""Two real gloo processes against one."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from megatron_specialm.base.environment import ALONE, World
from megatron_specialm.train.checkpoint import find_final, read_model
from megatron_specialm.train.metrics import read_metrics
from tests.training import run_training, stage


def _rank(rank: int, size: int, folder: Path, settings: dict) -> None:
    meeting = f"file://{folder}.rendezvous"
    run_training(folder, World(rank, size, rank, meeting, "test"), stage(**settings))


def _run(folder: Path, size: int, **settings) -> None:
    if size == 1:
        run_training(folder, ALONE, stage(**settings))
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, size, folder, settings)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size


@pytest.mark.parametrize("precision", ["fp32"])
def test_two_processes_train_as_one(tmp_path: Path, precision: str) -> None:
    settings = {"precision": precision, "early_stopping": {"evaluate_every": 6}}
    for size in (1, 2):
        _run(tmp_path / str(size), size, **settings, parallel={"data_parallel": size})
    one, two = (
        [(r["loss"], r["gradient_norm"]) for r in read_metrics(tmp_path / size) if "loss" in r] for size in "12"
    )
    assert len(one) == 12
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    weights_one, weights_two = (read_model(find_final(tmp_path / size)) for size in "12")
    for name, tensor in weights_one.items():
        torch.testing.assert_close(weights_two[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_begun_on_one_process_goes_on_on_two(tmp_path: Path) -> None:
    _run(tmp_path / "straight", 1)
    _run(tmp_path / "moved", 1, steps=4)
    (tmp_path / "moved" / "result.json").unlink()
    _run(tmp_path / "moved", 2, parallel={"data_parallel": 2})
    straight, moved = (read_model(find_final(tmp_path / name)) for name in ("straight", "moved"))
    for name, tensor in straight.items():
        torch.testing.assert_close(moved[name], tensor, rtol=1e-3, atol=1e-5)
