"""Two real gloo processes against one."""

from pathlib import Path

import pytest
import torch

from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.estimate.setup import Passes
from megatron_specialm.train.work import Work
from tests.training import CONTEXT, EPSILON, read_metrics, run_layout


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e-2, "epsilon": EPSILON}
    for size in (1, 2):
        layout = {"data_parallel": size}
        run_layout(tmp_path / str(size), early_stopping={"evaluate_every": 6}, parallel=layout, optimizer=optimizer)
    one, two = (
        [(r["loss"], r["gradient_norm"]) for r in read_metrics(tmp_path / size) if "loss" in r] for size in "12"
    )
    assert len(one) == 12
    # Both pay for the same passes: 12 steps of 8 windows, and validations of 16 before the first step and after 6 and 12.
    passes = [Work.read(tmp_path / size).passes for size in "12"]
    assert passes == [Passes(trained=12 * 8 * CONTEXT, evaluated=3 * 16 * CONTEXT)] * 2
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    weights_one, weights_two = (read_checkpoint(find_final(tmp_path / size)).weights for size in "12")
    for name, tensor in weights_one.items():
        torch.testing.assert_close(weights_two[name], tensor, rtol=1e-3, atol=1e-5)


def test_packed_passes_of_all_copies_are_counted(tmp_path: Path) -> None:
    """Copies read windows of different lengths: none stands for the others."""
    settings = {"early_stopping": {"evaluate_every": 6}, "packing": "packed"}
    for size in (1, 2):
        run_layout(tmp_path / str(size), parallel={"data_parallel": size}, **settings)
    one, two = (Work.read(tmp_path / size).passes for size in "12")
    last = [record for record in read_metrics(tmp_path / "2") if "loss" in record][-1]
    assert two == one and two.trained == last["slots"] == last["tokens"] < 12 * 8 * CONTEXT
