"""Megatron-core's models become Transformers', and Transformers' become megatron-core's: logits agree, in both formats."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_specialm.config.architectures import read_config
from megatron_specialm.convert.megatron_names import settings_of
from megatron_specialm.convert.run import convert
from megatron_specialm.convert.source import Layout
from tests.checkpoints import CONFIGS, MIXTURES, assert_same_logits, random_model, save_random_model
from tests.conftest import run_peer
from tests.peers.megatron_families import TENSOR, tokens

FAMILIES = {name.replace(" ", ""): config for name, config in CONFIGS.items() if name not in ("qwen3", *MIXTURES)}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron-LM's settings of each family, in one file."""
    folder = tmp_path_factory.mktemp("settings")
    found = {}
    for name, config in FAMILIES.items():
        config.save_pretrained(folder / name)
        path = folder / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [_class(name)]}))
        found[name] = settings_of(read_config(path), tensor_parallel=TENSOR, pipeline_parallel=1)
    (folder / "settings.json").write_text(json.dumps(found))
    return folder / "settings.json"


def _class(name: str) -> str:
    return {"neox": "GPTNeoX", "qwen2": "Qwen2"}.get(name, "Llama") + "ForCausalLM"


@pytest.mark.slow
@torch.no_grad()
def test_models_of_megatron_core_are_transformers_models(settings: Path, tmp_path: Path) -> None:
    run_peer("megatron_families", "save", tmp_path, settings)
    for name in FAMILIES:
        expected = load_file(tmp_path / name / "logits.safetensors")["logits"]
        fingerprints = []
        for form in ("torch_dist", "legacy"):
            target = tmp_path / f"{name}-{form}"
            fingerprints.append(convert(tmp_path / name / form, target, to="huggingface").fingerprint)
            model = AutoModelForCausalLM.from_pretrained(target).eval()
            logits = model(tokens(model.config.vocab_size)).logits
            assert_same_logits(logits, expected, (name, form))
        assert fingerprints[0] == fingerprints[1]


@pytest.mark.slow
@torch.no_grad()
def test_models_of_transformers_are_megatron_cores(settings: Path, tmp_path: Path) -> None:
    for name in FAMILIES:
        own = "llama 3" if name == "llama3" else name
        source = save_random_model(own, tmp_path / f"{name}-source")
        convert(source, tmp_path / name / "torch_dist", to="megatron", layout=Layout(tensor_parallel=TENSOR))
    run_peer("megatron_families", "load", tmp_path, settings)
    for name in FAMILIES:
        model = random_model("llama 3" if name == "llama3" else name)
        expected = model(tokens(model.config.vocab_size)).logits
        logits = load_file(tmp_path / name / "logits.safetensors")["logits"]
        assert_same_logits(logits, expected, name)
