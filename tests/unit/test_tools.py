"""The scripts of tools/ under the names that people look for are commands of `specialm`."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import declare_final
from megatron_specialm.config.model import LowRank, ModelConfig
from megatron_specialm.convert.formats import open_source
from megatron_specialm.model.weights import weight_specs
from tests.checkpoints import random_model, save_random_model
from tests.conftest import ROOT

SCRIPTS = (
    "convert_hf_to_megatron", "convert_hf_to_deepspeed", "convert_megatron_to_hf", "convert_deepspeed_to_hf", "merge_lora",
    "inspect_checkpoint",
)  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a script with arguments; what it printed."""

    def run_script(name: str, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out

    return run_script


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_has_help(name: str, run: Any) -> None:
    assert "Usage: specialm" in run(name, "--help")


def test_there_and_back(run: Any, tmp_path: Path) -> None:
    source = save_random_model("llama", tmp_path / "source")
    for format_ in ("megatron", "deepspeed"):
        run(f"convert_hf_to_{format_}", source, tmp_path / format_)
        run(f"convert_{format_}_to_hf", tmp_path / format_, tmp_path / f"{format_}-back")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / f"{format_}-back").state_dict()
        assert all(torch.equal(tensor, back[name]) for name, tensor in random_model("llama").state_dict().items())
    assert "megatron, family llama" in run("inspect_checkpoint", tmp_path / "megatron")


def test_adapters_are_merged(run: Any, llama: ModelConfig, tmp_path: Path) -> None:
    shape = llama.model_copy(update={"lora": LowRank(rank=2, alpha=4)})
    weights = {name: torch.ones(spec.shape) for name, spec in weight_specs(shape, vocabulary_size=50).items()}
    state = {"model": shape.model_dump(mode="json"), "vocabulary_size": 50, "context_length": 16, "tokenizer": "t"}
    save_checkpoint(tmp_path / "lora", step=1, weights=weights, optimizer_state={}, state=state)
    declare_final(tmp_path / "lora", step=1)
    run("merge_lora", tmp_path / "lora", tmp_path / "merged")
    merged = open_source(tmp_path / "merged").weights["decoder.layers.0.self_attention.linear_proj.weight"][()]
    assert torch.equal(merged, torch.full((32, 32), 1 + 2 * 2.0))  # base + alpha / rank * rank
