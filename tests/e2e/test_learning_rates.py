"""A training at several learning rates, through the command line: it makes the model that the best rate alone makes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_specialm.base.files import read_json
from megatron_specialm.checkpoint.steps import find_final
from tests.commands import cli, succeed
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CONFIG = """
name: rates
root: run
text:
  generic: {train: generic.train.jsonl, test: generic.test.jsonl}
  domains: {law: {train: law.train.jsonl, test: law.test.jsonl}}
defaults:
  train:
    {tokens: tokens, data: domain, model: {layers: 2, hidden_size: 32, ffn_hidden_size: 64, attention_heads: 4}, steps: 60,
     global_batch_size: 8, micro_batch_size: 4, schedule: {kind: cosine, warmup_steps: 2}, max_skipped_steps: 2, log_every: 1,
     checkpoint: {every: 3, keep: 1}, early_stopping: {evaluate_every: 6, patience: 9}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 300}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  whole: {kind: train, optimizer: {learning_rate: [1.0e-4, 1.0e-2, 1.0e+30]}}
  brief: {kind: train, optimizer: {learning_rate: [1.0e-2, 1.0e-4]}, trial_steps: 28}
  alone: {kind: train, optimizer: {learning_rate: 1.0e-2}}
  spread:
    {kind: train, parallel: {data_parallel: 2}, steps: 18, optimizer: {learning_rate: [1.0e+30, 1.0e-2, 1.0e-4]},
     trial_steps: 6}
  spread-alone: {kind: train, parallel: {data_parallel: 2}, steps: 18, optimizer: {learning_rate: 1.0e-2}}
  hopeless: {kind: train, optimizer: {learning_rate: [1.0e+30, 2.0e+30]}}
  perplexity: {kind: evaluate, tokens: tokens, models: [whole, brief, alone, spread, spread-alone]}
  export: {kind: export, tokens: tokens, models: [whole]}
"""
BEST, STEPS, TRIED = "0.01", 60, 30  # `trial_steps: 28`: until the next validation


@pytest.fixture(scope="module")
def finished(workplace: Path) -> Path:
    """A working directory in which the config has run; what it printed is in `stdout`."""
    (workplace / "stdout").write_text(succeed(workplace, "run", "config.yaml", "stages.hopeless=null"))
    return workplace


def _marker(root: Path, task: str) -> dict:
    stage, key = task.split("/")
    return read_json(root / stage / key / "done.json")


def _weights(folder: Path) -> bytes:
    return (find_final(folder) / "model-00000.safetensors").read_bytes()


def test_the_model_is_that_of_the_best_rate_alone(finished: Path) -> None:
    run = finished / "run"
    assert _weights(run / "whole/law") == _weights(run / "brief/law") == _weights(run / "alone/law")
    alone = _marker(run, "alone/law")["values"]
    for stage in ("whole", "brief"):
        values = _marker(run, f"{stage}/law")["values"]
        for fact in ("steps", "best_step", "validation_loss", "learning_rate"):
            assert values[fact] == alone[fact]
        tried = {
            rate: _marker(run, f"{stage}/law.rate-{rate}")["values"]["validation_loss"]
            for rate in values["learning_rates"]
        }
        assert values["learning_rates"] == tried
    assert _marker(run, f"brief/law.rate-{BEST}")["values"]["steps"] == TRIED


def test_several_processes_take_over_one_trial(finished: Path) -> None:
    run = finished / "run"
    ours, alone = (find_final(run / stage / "law") for stage in ("spread", "spread-alone"))
    files = sorted(path.name for path in alone.glob("*.safetensors"))
    assert len(files) > 2 and ours.name == alone.name
    assert [(ours / name).read_bytes() for name in files] == [(alone / name).read_bytes() for name in files]
    assert _marker(run, "spread/law")["values"]["learning_rates"]["1e+30"] is None


def test_trials_are_charged_and_nothing_twice(finished: Path) -> None:
    run = finished / "run"
    alone = _marker(run, "alone/law")["cost"]
    for stage, rates in (("whole", [BEST, "0.0001", "1e+30"]), ("brief", [BEST, "0.0001"])):
        best, *others = (_marker(run, f"{stage}/law.rate-{rate}")["cost"] for rate in rates)
        own = _marker(run, f"{stage}/law")["cost"]
        rows = read_json(run / "results.json")["rows"]
        (row,) = [row for row in rows if row["stage"] == stage]
        for cost in ("tokens", "slots", "flops"):
            assert best[cost] + own[cost] == alone[cost]
            assert all(other[cost] > 0 for other in others)
        for cost in ("tokens", "slots"):
            assert row[f"specialization_{cost}"] == alone[cost] + sum(other[cost] for other in others)
        assert row["learning_rate"] == 0.01
        if stage == "whole":  # its own task has trained nothing
            card = (run / "export/whole.law/model/README.md").read_text()
            assert own["tokens"] == 0 and f"| {row['specialization_tokens']:,} |" in card
            assert "| learning rate | 0.01, by validation loss of 0.0001, 0.01, 1e+30 |" in card


def test_a_rate_that_comes_to_nothing_is_out_of_the_choice(finished: Path) -> None:
    values = _marker(finished / "run", "whole/law.rate-1e+30")["values"]
    assert values["validation_loss"] is None and values["passes"]["trained"] > 0
    said = " ".join((finished / "run/jobs/whole.law.rate-1e+30.log").read_text().split())
    assert "learning rate 1e+30 is excluded from the selection: step" in said and "were not finite" in said
    failed = cli(finished, "run", "config.yaml", "--until", "hopeless")
    assert failed.returncode == 1 and failed.stdout.count("hopeless/law.rate") == 2
    assert "hopeless/law: at none of the learning rates 1e+30, 2e+30 were the losses finite" in failed.stderr
    assert "stages.hopeless.optimizer.learning_rate" in failed.stderr and "Traceback" not in failed.stderr


def test_the_choice_is_told(finished: Path) -> None:
    log = (finished / "run/jobs/brief.law.log").read_text()
    losses = _marker(finished / "run", "brief/law")["values"]["learning_rates"]
    told = f"(validation loss {losses[BEST]:.3f} against {losses['0.0001']:.3f})"
    assert f"brief/law: learning rate 0.01 of 0.01, 0.0001 {told}" in log
    assert "0.01 is at an end of the list: higher rates were not tried" in log
    assert "end of the list" not in (finished / "run/jobs/whole.law.log").read_text()
    for output in ((finished / "stdout").read_text(), succeed(finished, "results", "config.yaml")):
        table = [line.split() for line in output.partition("Choice of a learning rate")[2].splitlines()]
        assert ["brief", "law", "yes;", "higher", "not", "tried", "0.01", f"{losses[BEST]:.3f}"] in table
        assert ["whole", "law", "1e+30", "not", "finite"] in table


def test_another_rate_redoes_nothing_that_was_tried(finished: Path) -> None:
    more = "stages.whole.optimizer.learning_rate=[1.0e-3, 1.0e-2, 1.0e-4]"
    lines = succeed(finished, "plan", "config.yaml", more, "--tasks").splitlines()
    states = {words[0]: " ".join(words[1:3]) for line in lines if (words := line.split())}
    assert {rate: states[f"whole/law.rate-{rate}"].split()[0] for rate in ("0.001", BEST, "0.0001")} == {
        "0.001": "to", BEST: "done", "0.0001": "done",
    }  # fmt: skip
    assert states["whole/law"].startswith("stale")


def _kill_when(folder: Path, reached: Callable[[], bool], *arguments: str) -> None:
    """`kill -9` of a run with all its workers, once something is reached."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_specialm", "run", "config.yaml", *arguments], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or never came so far"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # workers end with their launcher


def _newest(folder: Path) -> int:
    steps = [int(path.name.removeprefix("step_")) for path in folder.glob("step_*")]
    return max(steps, default=-1)


def test_killed_in_a_trial_and_behind_it_it_ends_with_the_same_bits(finished: Path, tmp_path: Path) -> None:
    for path in finished.glob("*.*"):
        shutil.copy(path, tmp_path)
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns("brief"))
    brief = tmp_path / "run/brief"
    _kill_when(tmp_path, lambda: 6 <= _newest(brief / f"law.rate-{BEST}") < TRIED, "--only", "brief")
    assert not (brief / "law").exists()
    _kill_when(tmp_path, lambda: TRIED < _newest(brief / "law") < STEPS, "--only", "brief")
    assert not (brief / "law/done.json").exists()
    succeed(tmp_path, "run", "config.yaml", "--only", "brief", "--keys", "law")
    assert _weights(brief / "law") == _weights(finished / "run/alone/law")
    killed, straight = (_marker(root, "brief/law") for root in (tmp_path / "run", finished / "run"))
    for cost in ("tokens", "slots"):
        assert killed["cost"][cost] == straight["cost"][cost]
    assert killed["cost"]["flops"] >= straight["cost"]["flops"]
    starts = []
    for line in (brief / "law/metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            starts += [record["step"]] if record.get("event") == "start" else []
    assert starts[0] == TRIED and len(starts) == 2 and TRIED <= starts[1] < STEPS
