"""A Llama of Transformers that DeepSpeed has trained comes out as DeepSpeed's own tool says; what we write, DeepSpeed loads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.run import convert
from megatron_specialm.convert.source import Layout
from tests.checkpoints import save_random_model
from tests.conftest import run_peer

pytestmark = pytest.mark.slow


def test_a_llama_of_each_zero_stage(tmp_path: Path) -> None:
    run_peer("deepspeed_llama", "save", tmp_path)
    with pytest.raises(CheckpointError, match=r"name its config\.json by --config"):
        open_source(tmp_path / "zero1")
    for stage in (1, 2, 3):
        done = convert(tmp_path / f"zero{stage}", tmp_path / f"theirs{stage}", to="huggingface", config=tmp_path)
        assert done.source.layout == f"ZeRO {stage}" and done.source.step == 2
        expected = load_file(tmp_path / f"zero{stage}.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"theirs{stage}").state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_deepspeed_trains_from_a_universal_checkpoint(tmp_path: Path) -> None:
    source = save_random_model("llama 3", tmp_path / "source")
    convert(source, tmp_path / "universal", to="deepspeed")
    with pytest.raises(CheckpointError, match="a DeepSpeed target has no"):
        convert(source, tmp_path / "other", to="deepspeed", layout=Layout(tensor_parallel=2))
    run_peer("deepspeed_llama", "load", tmp_path)
    expected = load_file(source / "model.safetensors")
    loaded, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("loaded", "next"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(after[name], tensor) for name, tensor in expected.items())
