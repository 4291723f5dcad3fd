"""A model of Transformers that DeepSpeed has trained comes out as DeepSpeed's own tool says; what we write, DeepSpeed loads and
goes on from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.cli.app import app
from megatron_specialm.convert.adam import DEFAULTS
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.run import convert
from megatron_specialm.convert.source import Layout
from tests.checkpoints import save_random_model
from tests.conftest import made_once, run_peer
from tests.peers.deepspeed_llama import KINDS, STEPS, WORLD, batch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "deepspeed-llama", lambda folder: run_peer("deepspeed_llama", "save", folder))


def test_a_model_of_each_zero_stage(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"name its config\.json by --config"):
        open_source(saved / "zero1")
    for kind, (_, stage, _) in KINDS.items():
        config = saved / f"config-{kind}"
        done = convert(saved / kind, tmp_path / kind, to="huggingface", config=config, dtype=torch.float32)
        assert done.source.layout == f"ZeRO {stage}" and done.source.step == 2
        expected = load_file(saved / f"{kind}.safetensors")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_deepspeed_goes_on_with_the_same_losses(saved: Path, megatron_adam_saved: Path, tmp_path: Path) -> None:
    """By way of other formats, with the optimizer's state: the second loss is after an update. And from a training of
    Megatron-Core, as torch's AdamW does."""
    one, half = Layout(zero_stage=1, data_parallel=2), torch.bfloat16
    for kind in ("bf16", "zero1"):
        convert(saved / kind, tmp_path / f"{kind}-megatron", to="megatron", config=saved / f"config-{kind}")
    convert(tmp_path / "bf16-megatron", tmp_path / "bf16+zero1", to="deepspeed", layout=one, dtype=half)
    convert(tmp_path / "zero1-megatron", tmp_path / "zero1+universal", to="deepspeed")
    convert(saved / "neox", tmp_path / "neox-ours", to="canonical", config=saved / "config-neox")
    convert(tmp_path / "neox-ours", tmp_path / "neox+zero1", to="deepspeed", layout=one)
    convert(saved / "zero3", tmp_path / "zero3+universal", to="deepspeed", config=saved / "config-zero3")
    arguments = [saved / "zero3", tmp_path / "zero3+zero1", "--config", saved / "config-zero3"]
    options = ["--to", "deepspeed", "--zero-stage", "1", "--data-parallel", "2"]
    said = CliRunner().invoke(app, ["convert", *map(str, arguments), *options], catch_exceptions=False)
    assert said.exit_code == 0 and "Adam's state after 2 updates; read back, and every moment is equal" in " ".join(
        said.output.split()
    )
    convert(megatron_adam_saved / "plain", tmp_path / "megatron+universal", to="deepspeed")
    run_peer("deepspeed_llama", "resume", tmp_path)
    found = sorted(tmp_path.glob("*+*.json"))
    assert len(found) == 6
    for path in found:
        kind = path.name.split("+")[0]
        own = saved / f"{kind}.json"
        expected = json.loads(own.read_text()) if own.exists() else _losses_of_torch(tmp_path / f"{kind}+universal")
        assert json.loads(path.read_text()) == pytest.approx(expected, rel=1e-6), path.name


def _losses_of_torch(folder: Path) -> list[float]:
    """The losses of two steps of torch's AdamW on one process, from the tensors of a universal checkpoint."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
    settings = torch.load(folder / "global_step3" / "zero" / "optimizer_state.pt", weights_only=False)["param_groups"][
        0
    ]
    assert (settings["lr"], settings["betas"]) == (0.01, (0.8, 0.999))
    optimizer = torch.optim.AdamW(model.parameters(), **{name: settings[name] for name in DEFAULTS})
    for name, parameter in model.named_parameters():
        files = {path.stem: path for path in (folder / "global_step3" / "zero" / name).glob("*.pt")}
        parameter.data = torch.load(files["fp32"])["param"]
        moments = {kind: torch.load(files[kind])["param"] for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {**moments, "step": torch.load(files["step"])}
    losses = []
    for number in range(STEPS, STEPS + 2):
        tokens = [batch(number, rank=rank) for rank in range(WORLD)]
        loss = torch.stack([model(input_ids=own, labels=own).loss for own in tokens]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # DeepSpeed's default
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_deepspeed_trains_from_a_universal_checkpoint(tmp_path: Path) -> None:
    source = save_random_model("llama 3", tmp_path / "source")
    convert(source, tmp_path / "universal", to="deepspeed")
    for layout, message in (
        (Layout(tensor_parallel=2), "a deepspeed target has no --tensor-parallel"),
        (Layout(data_parallel=2), "ZeRO stage 0 for 2 ranks cannot be written: name --zero-stage 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "other", to="deepspeed", layout=layout)
    run_peer("deepspeed_llama", "load", tmp_path)
    expected = load_file(source / "model.safetensors")
    loaded, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("loaded", "next"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(after[name], tensor) for name, tensor in expected.items())
