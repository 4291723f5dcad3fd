"""What is written for DeepSpeed: DeepSpeed goes on from it with the same loss, and its tools read it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.deepspeed_folder import DeepSpeedFolder, open_deepspeed
from megatron_specialm.convert.deepspeed_writing import DeepSpeedState, write_universal, write_zero1
from tests.conftest import run_peer

pytestmark = pytest.mark.slow  # DeepSpeed trains and saves first


def _state(source: DeepSpeedFolder, **changes: Any) -> DeepSpeedState:
    content: dict[str, Any] = {
        "tensors": source.tensors, "groups": source.groups, "optimizer": source.optimizer, "settings": source.settings,
        "optimizer_step": source.optimizer_step, "step": source.step, "shared": source.shared,
    }  # fmt: skip
    return DeepSpeedState(**{**content, **changes})


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_specialm.convert.torch_zip_writing.SLICE_BYTES", 500)


def test_deepspeed_goes_on_with_the_same_loss(deepspeed_saved: Path, tmp_path: Path) -> None:
    """From a ZeRO-1 folder and from a universal checkpoint, whatever the source's ZeRO stage and expert parallelism."""
    for source in ("zero1", "zero3", "universal"):
        write_zero1(tmp_path / f"zero1+{source}", _state(open_deepspeed(deepspeed_saved / source)), data_parallel=2)
    for source in ("zero1", "zero2"):
        write_universal(tmp_path / f"universal+{source}", _state(open_deepspeed(deepspeed_saved / source)))
    for kind, experts in (("moe", 2), ("moe-ep1", 1)):
        state = _state(open_deepspeed(deepspeed_saved / kind))
        write_zero1(tmp_path / f"{kind}+{kind}", state, data_parallel=2, expert_parallel=experts)
    run_peer("deepspeed", "resume", tmp_path)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == 7
    for name, loss in losses.items():
        straight = name.partition("+")[2].replace("universal", "zero1")
        assert loss == json.loads((deepspeed_saved / f"{straight}.json").read_text())["loss"], name


@pytest.mark.parametrize(("data_parallel", "expert_parallel"), [(1, 1), (4, 2), (4, 4), (8, 2)])
def test_experts_are_dealt_out_and_found_again(
    deepspeed_saved: Path, tmp_path: Path, data_parallel: int, expert_parallel: int
) -> None:
    source = open_deepspeed(deepspeed_saved / "moe")
    write_zero1(tmp_path, _state(source), data_parallel=data_parallel, expert_parallel=expert_parallel)
    found = open_deepspeed(tmp_path)
    assert [group.names for group in found.groups] == [group.names for group in source.groups]
    for one, other in ((found.tensors, source.tensors), (found.optimizer, source.optimizer)):
        assert set(one) == set(other) and all(torch.equal(one[name][()], other[name][()]) for name in one)


def test_what_deepspeed_cannot_load_is_refused(deepspeed_saved: Path, tmp_path: Path) -> None:
    state = _state(open_deepspeed(deepspeed_saved / "moe"))
    with pytest.raises(CheckpointError, match="no universal checkpoints of models with experts"):
        write_universal(tmp_path / "universal", state)
    with pytest.raises(CheckpointError, match="expert parallelism 3 does not divide 4"):
        write_zero1(tmp_path / "zero1", state, data_parallel=3, expert_parallel=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("data_parallel", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_again(
    deepspeed_saved: Path, tmp_path: Path, data_parallel: int, dtype: torch.dtype
) -> None:
    source = open_deepspeed(deepspeed_saved / "zero2")
    folder = write_zero1(tmp_path, _state(source, dtype=dtype), data_parallel=data_parallel)
    found = open_deepspeed(tmp_path)
    assert found.folder == folder and found.shared == source.shared and found.optimizer_step == 3
    for one, other in ((found.tensors, source.tensors), (found.optimizer, source.optimizer)):
        assert set(one) == set(other) and all(torch.equal(one[name][()], other[name][()]) for name in one)


def test_zero_to_fp32_reads_what_is_written(deepspeed_saved: Path, tmp_path: Path) -> None:
    write_zero1(tmp_path / "written", _state(open_deepspeed(deepspeed_saved / "zero3")), data_parallel=3)
    command = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", tmp_path / "written", tmp_path / "fp32"]
    subprocess.run(command, check=True, capture_output=True)
    found = torch.load(tmp_path / "fp32" / "pytorch_model.bin")
    expected = load_file(deepspeed_saved / "zero3.safetensors")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_without_moments_they_are_zero(deepspeed_saved: Path, tmp_path: Path) -> None:
    source = open_deepspeed(deepspeed_saved / "zero1")
    write_zero1(tmp_path, _state(source, optimizer={}, optimizer_step=0), data_parallel=2)
    found = open_deepspeed(tmp_path)
    assert set(found.optimizer) == set(source.optimizer)
    assert not any(tensor[()].any() for tensor in found.optimizer.values())
