"""Which GPU is whose. No GPU is needed: torch and the driver are told how many there are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_specialm.base.accelerator import visible_gpus
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import MachineError
from megatron_specialm.engine.process_groups import device_of
from megatron_specialm.run.local import least_used


def test_a_process_takes_the_gpu_of_its_local_rank_or_the_one_that_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    third = replace(ALONE, rank=10, world_size=16, local_rank=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert device_of(third) == torch.device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task=1
    assert device_of(third) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MachineError, match=r"process 2 of this node .* 2 are visible: start one process per GPU"):
        device_of(third)


def test_gpus_by_the_names_that_cuda_takes(tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nfor i in 1 2 3; do echo 'NVIDIA H100, 9.0, 81559'; done\n")
    smi.chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert visible_gpus(path) == ["0", "1", "2"]
    assert visible_gpus({**path, "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c"}) == ["GPU-a", "GPU-b", "GPU-c"]
    assert visible_gpus({**path, "CUDA_VISIBLE_DEVICES": ""}) == []


def test_tasks_spread_over_the_gpus() -> None:
    gpus, running = ["4", "5", "6"], []
    for expected in (["4"], ["5"], ["6"], ["4"]):
        running.append(least_used(gpus, running, count=1))
        assert running[-1] == expected
    assert least_used(gpus, [["4", "5"]], count=2) == ["6", "4"]
    assert least_used([], [], count=2) == []
