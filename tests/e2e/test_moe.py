"""A mixture of experts through the command line: trained by two processes, killed, resumed, tuned, taught from and scored."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_specialm.checkpoint.opening import open_checkpoint
from megatron_specialm.checkpoint.steps import find_final, saved_steps
from tests.commands import succeed
from tests.conftest import ROOT
from tests.texts import write_sets
from tests.training import read_metrics

CONFIG = """
name: moe
root: run
text:
  generic: {train: generic.train.jsonl, test: generic.test.jsonl}
  domains: {law: {train: law.train.jsonl, test: law.test.jsonl}}
defaults:
  train:
    {tokens: tokens, data: generic, model: &dense {family: llama, layers: 2, hidden_size: 32, ffn_hidden_size: 64,
     attention_heads: 4}, steps: 60, global_batch_size: 8, micro_batch_size: 4, checkpoint: {every: 5}, log_every: 5,
     schedule: {warmup_steps: 2}, optimizer: {learning_rate: 3.0e-3}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 300}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  moe:
    {kind: train, model: {<<: *dense, moe: {experts: 4, shared_expert: 32, bias_update_rate: 0.001}},
    parallel: &split {data_parallel: 2, expert_parallel: 2, distributed_optimizer: true}}
  tuned: {kind: train, data: domain, init: moe, steps: 10, early_stopping: {evaluate_every: 5}}
  lora:
    {kind: train, data: domain, init: moe, steps: 10, lora: {rank: 4, linears: [qkv, proj]},
     early_stopping: {evaluate_every: 5}}
  taught: {kind: teach, teacher: moe, tokens: tokens, count: 20}
  student: {kind: train, data: domain, steps: 10, distill: {teacher: moe, alpha: 0.5}, parallel: *split}
  pupil: {kind: train, data: domain, steps: 10, distill: {teacher: moe, alpha: 0.5, cache: taught}}
  perplexity: {kind: evaluate, tokens: tokens, models: [moe, tuned, lora, student, pupil]}
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(find_final(folder / "run" / "moe" / "generic"))
    return {**checkpoint.weights, **checkpoint.optimizer_state}


def test_a_killed_training_resumes_to_the_same_bits_and_serves_the_pipeline(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    for folder in (straight, killed):
        folder.mkdir()
        (folder / "config.yaml").write_text(CONFIG)
        write_sets(folder, "generic", "law", words=100)
    own = ("run", "config.yaml", "--until", "moe")
    succeed(straight, *own)
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_specialm", *own], cwd=killed, env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    artifacts = killed / "run" / "artifacts" / "moe" / "generic"
    while not any(saved_steps(folder) for folder in artifacts.glob("*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (folder,) = artifacts.iterdir()
    succeed(killed, "run", "config.yaml")
    starts = [record["step"] for record in read_metrics(folder) if record.get("event") == "start"]
    assert starts[0] == 0 and 0 < starts[1] < 60, starts
    expected, found = _tensors(straight), _tensors(killed)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)

    losses = {
        link.name: json.loads((link / "evaluation.json").read_text())["law"]["nll"]
        for link in (killed / "run" / "perplexity").iterdir()
        if link.name.endswith(".law")
    }
    assert losses["tuned.law"] < losses["moe.generic.law"] and losses["lora.law"] < losses["moe.generic.law"]
    assert losses["student.law"] == pytest.approx(losses["pupil.law"], abs=0.5)
