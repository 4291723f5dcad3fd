"""`configs/pipelines/adapt.yaml` from end to end on a small model that Transformers has made, with an imported teacher."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from megatron_specialm.base.artifacts import read_marker
from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.cli.app import app
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.data.store import TokenStore
from megatron_specialm.graph.plan import make_plan
from tests.commands import succeed
from tests.conftest import ROOT
from tests.existing_models import ROWS, save_existing_model
from tests.texts import write_sets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = """
extends: CONFIG
text:
  generic: {train: text/generic.train.jsonl, test: text/generic.test.jsonl, validation_floor: {tokens: 500}}
  domains:
    support-tickets: null
    law: {train: text/law.train.jsonl, test: text/law.test.jsonl, validation_floor: {tokens: 500}}
defaults: {train: {precision: fp32, global_batch_size: 8, micro_batch_size: 8}}
stages:
  base:      {path: model, revision: null, model: null, vocabulary_size: null}
  tokens:    {context_length: 32}
  vectors:   {encoder: {dimensions: 8}}
  clusters:  {k: 4}
  continued: {steps: 12, schedule: {warmup_steps: 2}, optimizer: {learning_rate: 3.0e-3}}
  tuned:     {steps: 12, global_batch_size: 8, schedule: {warmup_steps: 2}, early_stopping: {evaluate_every: 6},
              optimizer: {learning_rate: 3.0e-3}}
  lora:      {steps: 12, global_batch_size: 8, schedule: {warmup_steps: 2}, early_stopping: {evaluate_every: 6},
              optimizer: {learning_rate: 3.0e-3}, lora: {rank: 4}}
  split:     {kind: train, data: domain, init: base, method: split, steps: 4, schedule: {warmup_steps: 2},
              parallel: {tensor_parallel: 2}}
  taught:    {kind: teach, teacher: base, tokens: tokens, keep: exact}
  student:   {kind: train, data: domain, model: {layers: 1, hidden_size: 16, ffn_hidden_size: 24, attention_heads: 2},
              distill: {teacher: base, cache: taught}, steps: 4, schedule: {warmup_steps: 2}}
  perplexity: {models: [base, continued, tuned, lora, split, student]}
"""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which it has run to its end."""
    folder = tmp_path_factory.mktemp("adapt")
    write_sets(folder / "text", "generic", "law", words=120)
    save_existing_model(folder / "model", "qwen2")
    shipped = ROOT / "configs" / "pipelines" / "adapt.yaml"
    (folder / "config.yaml").write_text(CONFIG.replace("CONFIG", str(shipped)))
    succeed(folder, "run", "config.yaml")
    return folder


def _rows(folder: Path) -> dict[tuple[str, str], dict]:
    rows = json.loads((folder / "runs/adapt/results.json").read_text())["rows"]
    return {(row["stage"], row["domain"]): row for row in rows}


@torch.no_grad()
def test_the_untouched_models_perplexity_is_that_of_transformers(adapted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapted / "model").float().eval()
    for source in ("generic", "law"):
        store = TokenStore.open(adapted / "runs/adapt/tokens" / source, "test")
        total, count = 0.0, 0
        for number in range(len(store)):
            window = torch.from_numpy(store.window(number).astype("int64"))
            inputs = torch.cat([torch.tensor([store.bos]), window[:-1]])
            total += functional.cross_entropy(model(inputs[None]).logits[0], window, reduction="sum").item()
            count += len(window)
        row = _rows(adapted)["base", source]
        assert row["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_every_model_made_from_it_is_compared_with_it(adapted: Path) -> None:
    rows = _rows(adapted)
    base = rows["base", "law"]
    assert base["method"] == base["imported"] == "base" and not base["finetuned"]
    assert all(row["bits_per_byte"] > 0 for row in rows.values()), "for models of other tokenizers"
    assert base["generic_tokens"] == base["specialization_tokens"] == 0
    for stage, method in {"continued": "adapted", "tuned": "adapted", "lora": "adapted-lora", "split": "split"}.items():
        assert rows[stage, "law"]["method"] == method and rows[stage, "law"]["nll"] < base["nll"]
    student = rows["student", "law"]
    assert student["method"] == "student" and student["imported"] == "base", "another model, which learned from it"
    assert "the cost of training an existing model (base)" in (adapted / "runs/adapt/results.md").read_text()


def test_trainings_keep_the_rows_of_the_model_and_begin_with_its_weights(adapted: Path) -> None:
    base, continued = (
        read_checkpoint(find_final(adapted / "runs/adapt" / name)).weights for name in ("base/generic", "continued/law")
    )
    for name, tensor in base.items():
        assert continued[name].shape == tensor.shape and (continued[name] - tensor).abs().max() < 0.1
    assert base["embedding.word_embeddings.weight"].shape[0] == ROWS


def test_its_export_is_a_model_of_transformers_with_its_tokenizer(adapted: Path) -> None:
    folder = adapted / "runs/adapt/export/tuned.law/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(adapted / "model")
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.vocab_size == ROWS
    text = "drinkrest flon"
    assert tokenizer(text).input_ids == [tokenizer.eos_token_id, *theirs(text, add_special_tokens=False).input_ids]
    card = (folder / "README.md").read_text()
    assert "1. `base`: not trained here: imported from `model`" in card
    marker = read_marker(adapted / "runs/adapt/base/generic")
    assert marker is not None and marker.values["source"]["format"] == "huggingface"


def test_it_is_generated_from_inspected_and_found_done(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert succeed(adapted, "generate", "runs/adapt/base/generic", "drin", "--tokens", "4")
    monkeypatch.chdir(adapted)
    inspected = CliRunner().invoke(app, ["inspect", "runs/adapt/base/generic", "--verify"]).output
    assert "canonical, family llama" in inspected and "every weight and the logits are as recorded" in inspected
    plan = make_plan(load_pipeline(Path("config.yaml")), Path("runs/adapt"))
    assert {planned.state for planned in plan.values()} == {"done"}
