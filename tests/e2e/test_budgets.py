"""Budgets of one method as stages that continue each other: each has the bits and the cost of a training of its own."""

import contextlib
from pathlib import Path

import pytest

from megatron_specialm.base.artifacts import Marker, read_marker
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.files import read_json
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.graph.plan import make_plan, write_resolved
from megatron_specialm.report.results import write_results
from megatron_specialm.run.worker import execute

CONFIG = """
name: budgets
root: run
text:
  generic: {train: generic.train.jsonl, test: generic.test.jsonl}
  domains: {law: {train: law.train.jsonl, test: law.test.jsonl}}
defaults:
  train:
    {tokens: tokens, model: {layers: 2, hidden_size: 32, ffn_hidden_size: 64, attention_heads: 4}, global_batch_size: 8,
     micro_batch_size: 4, schedule: {kind: wsd, warmup_steps: 2}, optimizer: {learning_rate: 1.0e-3}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 300}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  vectors: {kind: embed, tokens: tokens, encoder: {kind: tfidf, dimensions: 4}}
  clusters: {kind: cluster, vectors: vectors, k: 2}
  assignment: {kind: assign, clusters: clusters, vectors: vectors}
  slm-10: &slm {kind: train, data: generic, steps: 10, method: slm}
  slm-20: {<<: *slm, steps: 20, continues: slm-10}
  slm-30: {<<: *slm, steps: 30, continues: slm-20}
  slm-is-10: &slm-is {kind: train, data: importance, assignment: assignment, init: slm-10, steps: 10, method: slm-is}
  slm-is-20: {<<: *slm-is, steps: 20, continues: slm-is-10}
  perplexity: {kind: evaluate, tokens: tokens, models: [slm-10, slm-20, slm-30, slm-is-10, slm-is-20]}
"""
APART = ["root=apart", *(f"stages.{name}.continues=null" for name in ("slm-20", "slm-30", "slm-is-20"))]


def _run(*overrides: str) -> Path:
    """Run the config in this process."""
    pipeline = load_pipeline(Path("config.yaml"), overrides)
    root = Path(pipeline.root)
    write_resolved(pipeline, root)
    for planned in make_plan(pipeline, root).values():
        execute(pipeline, root, planned, ALONE, ProcessStatus())
    write_results(pipeline, root)
    return root


def _marker(root: Path, stage: str, key: str) -> Marker:
    marker = read_marker(root / stage / key)
    assert marker is not None
    return marker


@pytest.mark.timeout(300)
def test_budgets_that_continue_each_other_equal_trainings_of_their_own(workplace: Path) -> None:
    with contextlib.chdir(workplace):
        chained, apart = _run(), _run(*APART)
        models = [*((f"slm-{steps}", "generic") for steps in (10, 20, 30)), ("slm-is-20", "law")]
        for stage, key in models:
            steps = [find_final(root / stage / key) for root in (chained, apart)]
            for path in steps[1].glob("*.safetensors"):
                assert (steps[0] / path.name).read_bytes() == path.read_bytes(), stage
        # A fifth of the steps decay. Each budget is continued from the step before that.
        own = {stage: _marker(chained, stage, key) for stage, key in models}
        assert {stage: marker.values.get("earlier", {}).get("step") for stage, marker in own.items()} == {
            "slm-10": None, "slm-20": 8, "slm-30": 16, "slm-is-20": 8,
        }  # fmt: skip
        short = (chained / "slm-20/generic").resolve()
        assert own["slm-30"].values["earlier"]["artifact"] == f"../../slm-20/generic/{short.name}"
        rows = [read_json(root / "results.json")["rows"] for root in (chained, apart)]
        for ours, theirs in zip(*rows, strict=True):
            for column in (name for name in ours if "seconds" not in name):
                assert ours[column] == theirs[column], (ours["stage"], column)
