"""A Llama of Transformers that DeepSpeed has trained comes out as DeepSpeed's own tool says."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.run import convert
from tests.conftest import run_peer


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_a_llama_of_each_zero_stage(tmp_path: Path) -> None:
    run_peer("deepspeed_llama", tmp_path)
    with pytest.raises(CheckpointError, match=r"name its config\.json by --config"):
        open_source(tmp_path / "zero1")
    for stage in (1, 2, 3):
        done = convert(tmp_path / f"zero{stage}", tmp_path / f"theirs{stage}", to="huggingface", config=tmp_path)
        assert done.source.layout == f"ZeRO {stage}" and done.source.step == 2
        expected = load_file(tmp_path / f"zero{stage}.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"theirs{stage}").state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
