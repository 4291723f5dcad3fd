"""Adam's state of real Megatron-Core optimizers, read, written, and loaded by them in another layout."""

from pathlib import Path

import pytest
import torch

from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.run import convert, hash_moments, stream
from megatron_specialm.convert.source import Layout
from tests.conftest import run_peer
from tests.peers.megatron import STEP

pytestmark = pytest.mark.slow


def test_megatron_core_goes_on_from_what_was_written(megatron_adam_saved: Path, tmp_path: Path) -> None:
    """From Megatron through our format and back: its optimizer then holds what it held before, though in another layout."""
    expected = {}
    for form, dtype in (("plain", torch.float32), ("distributed", torch.bfloat16)):
        source = open_source(megatron_adam_saved / form)
        assert source.dtype == torch.float32 and len(source.rounded) == (form == "distributed") * len(source.weights)
        assert source.step == STEP and source.optimizer is not None and source.optimizer.step == STEP
        assert tuple(source.optimizer.settings["betas"]) == (0.8, 0.999)
        expected[form] = (stream(source), hash_moments(source))
        convert(megatron_adam_saved / form, tmp_path / f"{form}-ours", to="canonical")
        assert (tmp_path / f"{form}-ours" / f"step_{STEP:07d}" / "optimizer-00000.safetensors").is_file()
        written = tmp_path / f"{form}-written"
        convert(tmp_path / f"{form}-ours", written, to="megatron", layout=Layout(tensor_parallel=2), dtype=dtype)
    run_peer("megatron_adam", "load", tmp_path)
    for form, values in expected.items():
        again = open_source(tmp_path / f"{form}-again")
        assert again.optimizer is not None and again.optimizer.step == STEP
        assert (stream(again), hash_moments(again)) == values


def test_buffers_are_left_out_with_the_reason(megatron_adam_saved: Path, tmp_path: Path) -> None:
    done = convert(megatron_adam_saved / "buffers", tmp_path / "ours", to="canonical", dtype=torch.float32)
    (reason,) = [reason for name, reason in done.source.dropped.items() if name.startswith("optimizer")]
    assert "--dist-ckpt-optim-fully-reshardable" in reason and done.source.optimizer is None
