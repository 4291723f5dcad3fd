"""An MoE that routes by cluster, through the command line: trained, killed and resumed, selected from, fine-tuned, evaluated,
exported."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_specialm.base.files import read_json
from megatron_specialm.checkpoint.merged import read_merged, read_trained
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.model.merge import one_hot
from tests.commands import succeed
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = """
name: gated
root: run
text:
  generic: {train: generic.train.jsonl, test: generic.test.jsonl}
  domains: {law: {train: law.train.jsonl, test: law.test.jsonl}}
defaults:
  train:
    {tokens: tokens, steps: 60, global_batch_size: 8, micro_batch_size: 4, schedule: {kind: constant, warmup_steps: 2},
     checkpoint: {every: 3, keep: 1}, log_every: 1, early_stopping: {evaluate_every: 15, patience: 9}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 300}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  vectors: {kind: embed, tokens: tokens, encoder: {kind: tfidf, dimensions: 8}}
  clusters: {kind: cluster, vectors: vectors, k: 3}
  assignment: {kind: assign, clusters: clusters, vectors: vectors}
  gated:
    {kind: train, data: generic, assignment: assignment,
     model: {layers: 2, hidden_size: 32, ffn_hidden_size: 64, attention_heads: 4, moe: {experts: 3, route: cluster}}}
  chosen:
    {kind: select, experts: gated, tokens: tokens, by: loss, compare: [finetuned],
     trial: {steps: 3, global_batch_size: 4, micro_batch_size: 4}}
  tuned: {kind: train, data: domain, init: chosen, steps: 6}
  perplexity: {kind: evaluate, tokens: tokens, models: [chosen, tuned]}
  export: {kind: export, tokens: tokens, models: [tuned]}
"""


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Path:
    """A working directory in which the config has run."""
    succeed(workplace, "run", "config.yaml")
    return workplace


def test_a_selected_expert_is_an_ordinary_model(finished: Path) -> None:
    run = finished / "run"
    trained, chosen = read_trained(find_final(run / "gated/generic")), read_merged(find_final(run / "chosen/law"))
    values = {
        stage: read_json(run / stage / "done.json")["values"] for stage in ("gated/generic", "chosen/law", "tuned/law")
    }
    expert = int(values["chosen/law"]["choice"].removeprefix("c"))
    expected = trained.merged(one_hot(expert, experts=3))
    assert chosen.shape == trained.shape.base_config and chosen.shape.moe is None
    assert chosen.weights.keys() == expected.weights.keys()
    assert all(torch.equal(chosen.weights[name], expected.weights[name]) for name in chosen.weights)
    assert set(values["chosen/law"]["criteria"]) >= {"frequency", "loss", "finetuned"}
    gated = values["gated/generic"]
    assert gated["validation_loss"] is not None
    assert gated["trained_parameters"] > gated["parameters"] == values["tuned/law"]["parameters"]
    rows = read_json(run / "results.json")["rows"]
    assert {row["method"] for row in rows} == {"gated"}
    assert (run / "export/tuned.law/model/model.safetensors").is_file()
    succeed(finished, "project", "run/gated/generic", "own", "--expert", str(expert))
    assert all(
        torch.equal(tensor, expected.weights[name])
        for name, tensor in read_merged(find_final(finished / "own")).weights.items()
    )


def test_killed_and_resumed_it_ends_with_the_same_bits(finished: Path) -> None:
    killed, own = finished / "killed", ("run", "config.yaml", "root=killed", "--only", "gated")
    shutil.copytree(finished / "run", killed, symlinks=True, ignore=shutil.ignore_patterns("gated", ".lock*"))
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_specialm", *own], cwd=finished, env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not any((killed / "artifacts/gated").glob("*/*/step_*")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or never came so far"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # workers end with their launcher
    assert not (killed / "gated/generic/done.json").exists()
    succeed(finished, *own)
    files = [find_final(root / "gated/generic") / "model-00000.safetensors" for root in (finished / "run", killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
