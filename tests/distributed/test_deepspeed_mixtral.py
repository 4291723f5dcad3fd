"""A Mixtral goes to DeepSpeed, is trained there and comes back: with DeepSpeed's MoE layers at expert parallelism 2, and as
Transformers' own module. Logits agree on both ways."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_specialm.convert.run import convert
from megatron_specialm.convert.source import Layout
from tests.checkpoints import assert_same_logits, random_model, save_random_model
from tests.conftest import run_peer
from tests.peers.megatron_families import tokens

LAYOUTS = {"layers": Layout(expert_parallel=2, zero_stage=1, data_parallel=2), "module": Layout()}


@pytest.mark.slow
@torch.no_grad()
def test_deepspeed_trains_a_mixtral(tmp_path: Path) -> None:
    source = save_random_model("mixtral", tmp_path / "source")
    for kind, layout in LAYOUTS.items():
        convert(source, tmp_path / f"{kind}-written", to="deepspeed", layout=layout)
    run_peer("deepspeed_mixtral", "train", tmp_path)
    model = random_model("mixtral")
    expected = model(tokens(model.config.vocab_size)).logits
    for kind in LAYOUTS:
        found = load_file(tmp_path / f"{kind}.safetensors")
        assert_same_logits(found["loaded"], expected, kind)
        back = convert(tmp_path / f"{kind}-saved", tmp_path / f"{kind}-theirs", to="huggingface", config=source)
        assert back.source.layout == "ZeRO 1" and back.source.step == 1
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-theirs").eval()
        assert_same_logits(again(tokens(again.config.vocab_size)).logits, found["next"], kind)
        assert (found["next"] - expected).abs().max() > 1e-3  # it was trained
        kept = convert(tmp_path / f"{kind}-saved", tmp_path / f"{kind}-ours", to="canonical", config=source).source
        assert kept.optimizer is not None and kept.optimizer.step == 1
