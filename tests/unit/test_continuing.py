from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_specialm.base.artifacts import Cost, artifact_folder, begin_artifact
from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import write_json
from megatron_specialm.checkpoint.opening import newest_checkpoint
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import step_folder
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.data.training_data import TrainingData
from megatron_specialm.graph.plan import make_plan
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.stages.continuing import Earlier, go_on_from_earlier
from tests.contexts import make_context

CONFIG = """
name: small
root: run
text: {generic: {train: g.txt, test: t.txt}, domains: {law: {train: law.txt, test: t.txt}}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 300}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  slm: {kind: train, data: generic, tokens: tokens, model: nano, steps: 40, global_batch_size: 8, schedule: {warmup_steps: 0}}
"""
COST = Cost(1_280, 9, 2.0, 4.0, "cpu", 2, 1_280)
NAME = TaskId("slm", "generic")


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    for name in ("g", "t", "law"):
        Path(f"{name}.txt").write_text(f"some words of {name}\n")


def _begin(steps: int) -> Path:
    planned = make_plan(load_pipeline(Path("config.yaml"), [f"stages.slm.steps={steps}"]), Path("run"))[NAME]
    return begin_artifact(Path("run"), *NAME, digest=planned.digest, made_from=planned.made_from)


def _save(folder: Path, step: int, **state: Any) -> None:
    progress = {"step": step, "tokens": 32 * step, **state.pop("progress", {})}
    save_checkpoint(
        folder, step=step, weights={"w": torch.full((4,), float(step))}, optimizer_state={"m": torch.zeros(4)},
        state={"progress": progress, "learning_rate": 1e-4, "spent": asdict(COST), **state},
    )  # fmt: skip


def _go_on(steps: int) -> Earlier | None:
    pipeline = load_pipeline(Path("config.yaml"), [f"stages.slm.steps={steps}"])
    planned = make_plan(pipeline, Path("run"))[NAME]
    folder, stage = artifact_folder(Path("run"), *NAME, planned.digest), pipeline.stages["slm"]
    store: Any = SimpleNamespace(context_length=32)
    unread: Any = None
    reading = TrainingData(stage, store, unread, unread, unread, None, lambda settings: settings)
    return go_on_from_earlier(stage, reading, make_context(pipeline, planned.task, Path("run"), folder))


def test_a_longer_training_goes_on_from_the_newest_step(config: None) -> None:
    short = _begin(40)
    _save(short, 20)
    _save(short, 40)
    longer = _begin(60)
    earlier = _go_on(60)
    assert earlier == Earlier(short.name, 40, 1_280, 40 * 8 * 32, COST) == Earlier.read(longer)
    assert newest_checkpoint(longer) == (step_folder(longer, 40), [])


@pytest.mark.parametrize(
    "state",
    [
        {"progress": {"tokens": "many"}},
        {"progress": {"best_step": [20]}},
        {"learning_rate": "low"},
        {"learning_rate": None},
        {"spent": {"tokens": 3}},
    ],
)
def test_a_step_whose_state_is_of_another_shape_is_passed_over(
    config: None, caplog: pytest.LogCaptureFixture, state: dict[str, Any]
) -> None:
    short = _begin(40)
    _save(short, 20)
    _save(short, 40, **state)
    _begin(60)
    with caplog.at_level("INFO"):
        earlier = _go_on(60)
    assert earlier is not None and earlier.step == 20
    assert "does not go on from step 40" in caplog.text


def test_a_best_step_that_is_damaged_here_is_taken_from_there(config: None) -> None:
    short, longer = _begin(40), _begin(60)
    for folder in (short, longer):
        _save(folder, 20)
    _save(short, 40, progress={"best_step": 20})
    (step_folder(longer, 20) / "model-00000.safetensors").write_bytes(b"")
    assert _go_on(60) is not None
    assert newest_checkpoint(longer) == (step_folder(longer, 40), [])


@pytest.mark.parametrize(
    "noted",
    [{}, [], {"step": "40"}, {"tokens": None}, {"cost": {"tokens": 3}}, {"cost": {**asdict(COST), "flops": "9"}}],
)
def test_a_damaged_note_is_named(tmp_path: Path, noted: Any) -> None:
    whole = asdict(Earlier("a", 40, 1_280, 5_120, COST))
    write_json(tmp_path / "earlier.json", {**whole, **noted} if noted else noted)
    with pytest.raises(ArtifactError, match=r"earlier\.json: .*move .* away"):
        Earlier.read(tmp_path)
