"""Another seed of trainings in another run folder: text, vectors and clusters are taken over, weights differ."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_specialm.base import process_status as counting
from megatron_specialm.base.artifacts import MARKER, artifact_link, read_marker
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.checkpoint.opening import read_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.data.store import TokenStore
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.plan import make_plan
from megatron_specialm.report.seeds import merge_seeds, read_runs
from megatron_specialm.run.worker import execute
from tests.commands import cli, succeed
from tests.conftest import ROOT

TEXT = "the court held that a tenant may keep what was planted before notice of leave had been given by its owner"
WORDS = TEXT.split()
CONFIG = """
name: seeds
root: runs/first
text:
  generic: {train: generic.txt, test: law.txt}
  domains: {law: {train: law.txt, test: generic.txt}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 290}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  vectors: {kind: embed, tokens: tokens, encoder: {kind: tfidf, dimensions: 4}}
  clusters: {kind: cluster, vectors: vectors, k: 2}
  assignment: {kind: assign, clusters: clusters, vectors: vectors}
  slm-is:
    {kind: train, data: importance, assignment: assignment, tokens: tokens, model: nano, steps: 3, global_batch_size: 8,
     micro_batch_size: 4, schedule: {warmup_steps: 0}}
  taught: {kind: teach, teacher: slm-is, tokens: tokens, count: 4}
  perplexity: {kind: evaluate, tokens: tokens, models: [slm-is]}
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _run(folder: Path, *arguments: str) -> str:
    return succeed(folder, "run", "config.yaml", *arguments)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the run of one seed."""
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "config.yaml").write_text(CONFIG)
    for number, name in enumerate(("generic", "law"), 1):
        lines = (" ".join(WORDS[(i * j * j + number * j) % len(WORDS)] for j in range(60)) for i in range(1, 80))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    _run(folder)
    return folder


def _content(root: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(root.rglob("*")) if path.is_file()}


def _weights(root: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(find_final(root / "slm-is" / "law")).weights


def test_a_seed_of_trainings_costs_trainings_only(first: Path) -> None:
    before = _content(first / "runs/first")
    said = _run(first, "root=runs/second", "training_seed=1", "reuse=runs/first")
    assert "seeds: 3 of 12 tasks to do, 9 taken over from runs/first, in runs/second" in said
    assert set(re.findall(r"\] (\S+): done", said)) == {"slm-is/law", "taught/law", "perplexity/slm-is.law"}
    assert _content(first / "runs/first") == before
    one, other = _weights(first / "runs/first"), _weights(first / "runs/second")
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for stage in ("tokens", "vectors", "assignment"):
        markers = [read_marker(artifact_link(first / "runs" / run, stage, "law")) for run in ("first", "second")]
        assert markers[0] is not None and markers[0] == markers[1], "the digest and the cost of its making"
    merged = merge_seeds(read_runs([first / "runs" / run / "results.json" for run in ("first", "second")]))
    row = merged.rows[0].columns()
    assert (
        len(merged.rows) == 1
        and row["seeds"] == [0, 0]
        and row["training_seeds"] == [0, 1]
        and row["perplexity_sd"] > 0
    )
    assert {entry.columns()["entropy_sd"] for entry in merged.concentration} == {None}
    assert "seeds: 0 of 12 tasks to do, in runs/second" in _run(
        first, "root=runs/second", "training_seed=1", "reuse=runs/first"
    )


def test_equal_seeds_are_the_same_run_by_whatever_name(first: Path) -> None:
    assert "seeds: 0 of 12 tasks to do, in runs/first" in _run(first, "training_seed=0", "reuse=runs/first")


def test_ranks_of_a_launcher_take_over_too(first: Path) -> None:
    before = _content(first / "runs/first")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_specialm",
        "run", "config.yaml", "root=runs/third", "reuse=runs/first", "--only", "slm-is",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    outcome = subprocess.run(command, cwd=first, env=environment, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert _content(first / "runs/first") == before
    third = first / "runs/third"
    assert read_marker(artifact_link(third, "slm-is", "law")) == read_marker(
        artifact_link(first / "runs/first", "slm-is", "law")
    )
    assert (third / "tokens/generic/train.bin").samefile(first / "runs/first/tokens/generic/train.bin")
    assert read_marker(artifact_link(third, "perplexity", "slm-is.law")) is None


@pytest.mark.parametrize("stage", ["perplexity", "taught"])
def test_long_stages_say_how_far_they_are(
    stage: str, first: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(first)
    monkeypatch.setattr(counting, "COUNT_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    pipeline = load_pipeline(Path("config.yaml"), ["stages.perplexity.batch_size=4", "stages.taught.batch_size=4"])
    task = next(task for name, task in build_graph(pipeline).items() if name.stage == stage)
    root = Path(pipeline.root)
    planned = make_plan(pipeline, root)[task.id]
    (artifact_link(root, *task.id) / MARKER).unlink()
    execute(pipeline, root, planned, ALONE, ProcessStatus())
    windows = TokenStore.open(root / "tokens/law", {"perplexity": "test", "taught": "train"}[stage])
    assert f"working on {task.id}: 4 of {len(windows)} windows, " in caplog.text
    assert f"working on {task.id}: {len(windows):,} of {len(windows):,} windows, " in caplog.text
    assert not (artifact_link(root, *task.id) / counting.PROGRESS).exists()


def test_what_is_no_run_folder_is_refused(first: Path) -> None:
    for command in ("run", "plan", "check", "submit"):
        outcome = cli(first, command, "config.yaml", "root=runs/fourth", "reuse=data")
        assert outcome.returncode == 2 and "reuse: data: is not a run folder" in outcome.stderr, outcome.stderr
    assert not (first / "runs/fourth").exists()
