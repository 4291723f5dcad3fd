"""What the driver refuses before it reads, what it leaves behind, and what the commands say of odd checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_specialm.base.errors import ArtifactError, CheckpointError
from megatron_specialm.base.files import write_json
from megatron_specialm.cli.app import app
from megatron_specialm.convert import run as driver
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.run import convert
from megatron_specialm.convert.source import Layout
from tests.checkpoints import save_random_model

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model("llama", tmp_path_factory.mktemp("source") / "llama")


def _with_norm(source: Path, folder: Path, norm: torch.Tensor) -> Path:
    """A copy with another final norm."""
    shutil.copytree(source, folder)
    save_file({**load_file(source / "model.safetensors"), NORM: norm}, folder / "model.safetensors")
    return folder


def _specialm(*words: object) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(app, list(map(str, words)))
    return done.output, done.exception


@pytest.mark.parametrize(
    ("to", "layout", "message"),
    [
        ("megatron", Layout(tensor_parallel=3), "does not divide the model's 4 heads: choose a --tensor-parallel"),
        ("megatron-legacy", Layout(pipeline_parallel=2), "3 layers: choose a --pipeline-parallel"),
        ("megatron", Layout(zero_stage=1), "a megatron target has no --zero-stage"),
        ("megatron", Layout(data_parallel=2), "a megatron target has no --data-parallel"),
        ("huggingface", Layout(tensor_parallel=2), "a huggingface target has no --tensor-parallel"),
        ("canonical", Layout(expert_parallel=2), "a canonical target has no --expert-parallel"),
        ("deepspeed", Layout(pipeline_parallel=2), "a deepspeed target has no --pipeline-parallel"),
        ("deepspeed", Layout(data_parallel=2), "name --zero-stage 1"),
    ],
)
def test_a_layout_is_refused_before_anything_is_read(
    to: str, layout: Layout, message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "stream", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "new" / "deep" / "target", to=to, layout=layout)
    assert not list(tmp_path.iterdir())


def test_an_error_names_the_target_and_leaves_no_new_parents(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(path: Path) -> None:
        raise CheckpointError(f"{path}: is damaged")

    monkeypatch.setitem(driver.write_target.__globals__, "open_source", damaged)
    target = tmp_path / "new" / "deep" / "target"
    with pytest.raises(CheckpointError) as raised:
        driver.write_target(open_source(source), target, to="canonical")
    assert str(raised.value) == f"{target}: is damaged"
    assert not list(tmp_path.iterdir())


def test_a_signal_leaves_no_target(source: Path, tmp_path: Path) -> None:
    """The signal comes while the target is being written."""
    program = (
        "import os, signal, sys; from megatron_specialm.cli import main; from megatron_specialm.convert import run\n"
        "def asked(*_, **__):\n"
        f"    assert os.listdir({str(tmp_path)!r}); os.kill(os.getpid(), signal.SIGTERM)\n"
        "run._check_written = asked\n"
        f"sys.argv = ['specialm', 'convert', {str(source)!r}, {str(tmp_path / 'target')!r}, '--to', 'canonical']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 75 and "stopped by SIGTERM while converting" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_weights_of_a_quantized_type_are_refused(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    odd = _with_norm(source, tmp_path / "odd", torch.ones(32).to(dtype))
    with pytest.raises(CheckpointError, match=rf"{NORM} is of type {str(dtype).removeprefix('torch.')}"):
        convert(odd, tmp_path / "target", to="canonical")


def test_weights_that_are_not_finite_are_named_and_equal_to_themselves(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    norm = torch.ones(32)
    norm[3], norm[4] = torch.nan, torch.inf
    odd = _with_norm(source, tmp_path / "odd", norm)
    convert(odd, tmp_path / "target", to="megatron")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [f"{odd}: decoder.final_layernorm.weight has NaN or infinite elements"]
    told, error = _specialm("diff", odd, tmp_path / "target")
    assert error is None and "21 of 21 weights are equal" in told, told
    told, error = _specialm("diff", odd, source)
    assert isinstance(error, SystemExit) and "decoder.final_layernorm.weight" in told


def test_rounded_weights_are_called_so(source: Path, tmp_path: Path) -> None:
    double = _with_norm(source, tmp_path / "double", torch.full((32,), 1 + 1e-9, dtype=torch.float64))
    assert "in float32 (rounded from float64)" in _specialm("convert", double, tmp_path / "x", "--to", "canonical")[0]
    assert "(rounded from" not in _specialm("convert", source, tmp_path / "y", "--to", "canonical")[0]
    told, _ = _specialm("convert", source, tmp_path / "z", "--to", "huggingface", "--dtype", "bf16")
    assert "in bfloat16 (rounded from float32)" in told


def test_inspect_says_what_an_unknown_architecture_has(source: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(source, tmp_path / "odd")
    settings = json.loads((odd / "config.json").read_text())
    write_json(odd / "config.json", {**settings, "architectures": ["GPT2LMHeadModel"]})
    told, error = _specialm("inspect", odd, "--tensors")
    assert isinstance(error, CheckpointError) and "GPT2LMHeadModel is not known" in str(error)
    assert f"{odd}: huggingface; it cannot be converted" in told and "of type float32" in told and NORM in told
    write_json(odd / "config.json", {**settings, "architectures": None})
    assert "does not name its class" in str(_specialm("inspect", odd)[1])


def test_inspect_compares_settings_with_the_fingerprint(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "odd", to="huggingface")
    settings = json.loads((tmp_path / "odd" / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 7.0
    write_json(tmp_path / "odd" / "config.json", settings)
    _, error = _specialm("inspect", tmp_path / "odd")
    assert isinstance(error, CheckpointError) and "rotary_base is 7, and its fingerprint says 700" in str(error)


@pytest.mark.parametrize(
    ("to", "lost", "message"),
    [
        ("huggingface", "config.json", r"config\.json: no such file"),
        ("megatron", "release/.metadata", r"\.metadata: no such file"),
        ("megatron", "release/metadata.json", r"metadata\.json: no such file"),
        ("megatron-legacy", "release/mp_rank_00/model_optim_rng.pt", r"model_optim_rng\.pt: no such file"),
        ("deepspeed", "global_step0/mp_rank_00_model_states.pt", r"mp_rank_00_model_states\.pt"),
    ],
)
def test_an_incomplete_checkpoint_is_recognized_and_the_missing_file_named(
    to: str, lost: str, message: str, source: Path, tmp_path: Path
) -> None:
    layout = Layout(zero_stage=1) if to == "deepspeed" else Layout()
    convert(source, tmp_path / "target", to=to, layout=layout)
    os.unlink(tmp_path / "target" / lost)
    with pytest.raises(ArtifactError, match=message):
        open_source(tmp_path / "target")


def test_a_file_is_no_checkpoint(source: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"a file: name the checkpoint's folder, {source}"):
        open_source(source / "model.safetensors")
