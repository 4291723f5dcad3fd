"""Megatron-core's mixtures of experts become Transformers', and Transformers' become megatron-core's, at expert parallelism 2:
logits agree, in both formats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_specialm.config.architectures import read_config
from megatron_specialm.convert.megatron_names import settings_of
from megatron_specialm.convert.run import convert
from megatron_specialm.convert.source import Layout
from tests.checkpoints import assert_same_logits, random_model, save_random_model
from tests.conftest import run_peer
from tests.peers.megatron_families import tokens

# Equal layers under tensor parallelism; and experts in every second layer, with a shared one, under pipeline parallelism.
LAYOUTS = {"mixtral": Layout(tensor_parallel=2, expert_parallel=2), "qwen2-moe": Layout(1, 2, 2)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: save_random_model(name, root / name) for name in LAYOUTS}


def _settings(sources: dict[str, Path], folder: Path, **more: Any) -> Path:
    """Megatron-LM's settings of each model, in one file."""
    found = {
        name: settings_of(
            read_config(sources[name] / "config.json"),
            tensor_parallel=layout.tensor_parallel,
            pipeline_parallel=layout.pipeline_parallel,
            expert_parallel=layout.expert_parallel,
        )
        for name, layout in LAYOUTS.items()
    }
    path = folder / "settings.json"
    path.write_text(json.dumps({**found, **{name: {**found["mixtral"], **own} for name, own in more.items()}}))
    return path


@pytest.mark.slow
@torch.no_grad()
def test_mixtures_of_megatron_core_are_transformers_models(sources: dict[str, Path], tmp_path: Path) -> None:
    run_peer("megatron_families", "save", tmp_path, _settings(
        sources, tmp_path, top1={"moe_router_topk": 1, "moe_router_pre_softmax": True}))  # fmt: skip
    for name, architecture in {"mixtral": "Mixtral", "qwen2-moe": "Qwen2Moe", "top1": "Qwen2Moe"}.items():
        expected = load_file(tmp_path / name / "logits.safetensors")["logits"]
        fingerprints = []
        for form in ("torch_dist", "legacy"):
            target = tmp_path / f"{name}-{form}"
            fingerprints.append(convert(tmp_path / name / form, target, to="huggingface").fingerprint)
            model = AutoModelForCausalLM.from_pretrained(target).eval()
            assert type(model).__name__ == f"{architecture}ForCausalLM"
            logits = model(tokens(model.config.vocab_size)).logits
            assert_same_logits(logits, expected, (name, form))
        assert fingerprints[0] == fingerprints[1]


@pytest.mark.slow
@torch.no_grad()
def test_mixtures_of_transformers_are_megatron_cores(sources: dict[str, Path], tmp_path: Path) -> None:
    for name, layout in LAYOUTS.items():
        convert(sources[name], tmp_path / name / "torch_dist", to="megatron", layout=layout)
        convert(sources[name], tmp_path / name / "legacy", to="megatron-legacy", layout=layout)
    run_peer("megatron_families", "load", tmp_path, _settings(sources, tmp_path))
    for name in LAYOUTS:
        model = random_model(name)
        expected = model(tokens(model.config.vocab_size)).logits
        found = load_file(tmp_path / name / "logits.safetensors")
        for form in ("logits", "legacy"):
            assert_same_logits(found[form], expected, (name, form))
