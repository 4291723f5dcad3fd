"""Other `steps` of a training: it goes on from what there is, to the bits of one made at once."""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_specialm.base.artifacts import MARKER, Marker, read_marker
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.files import read_json
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.checkpoint.steps import find_final, saved_steps, step_folder
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.graph.plan import make_plan, write_resolved
from megatron_specialm.report.results import write_results
from megatron_specialm.run.worker import execute
from megatron_specialm.stages import continuing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Of `stopped` the last step is validated as an end, at 40 and not at 60; `chosen` is decided at step 10.
CONFIG = """
name: longer
root: run
text:
  generic: {train: generic.train.jsonl, test: generic.test.jsonl}
  domains: {law: {train: law.train.jsonl, test: law.test.jsonl}}
defaults:
  train:
    {tokens: tokens, data: generic, model: {layers: 2, hidden_size: 32, ffn_hidden_size: 64, attention_heads: 4}, steps: 40,
     global_batch_size: 8, micro_batch_size: 4, schedule: {kind: constant, warmup_steps: 2}, checkpoint: {every: 10, keep: 2}}
stages:
  tokenizer: {kind: tokenizer, vocabulary_size: 300}
  tokens: {kind: tokenize, tokenizer: tokenizer, context_length: 32}
  constant: {kind: train}
  wsd: {kind: train, schedule: {kind: wsd}}
  cosine: {kind: train, schedule: {kind: cosine}}
  stopped: {kind: train, data: domain, early_stopping: {evaluate_every: 15, patience: 9}}
  chosen:
    {kind: train, data: domain, early_stopping: {evaluate_every: 10, patience: 9}, trial_steps: 10,
     optimizer: {learning_rate: [1.0e-2, 1.0e-4]}}
  perplexity: {kind: evaluate, tokens: tokens, models: [constant, wsd, stopped, chosen]}
"""
TRAININGS = {"constant": "generic", "wsd": "generic", "cosine": "generic", "stopped": "law", "chosen": "law"}


def _run(folder: Path, *overrides: str) -> str:
    """Do in this process what the config lacks in a working directory; what was said of going on."""
    with contextlib.chdir(folder):
        pipeline = load_pipeline(Path("config.yaml"), overrides)
        root = Path(pipeline.root)
        write_resolved(pipeline, root)
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger(continuing.__name__)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        for planned in make_plan(pipeline, root).values():
            if planned.is_to_do:
                execute(pipeline, root, planned, ALONE, ProcessStatus())
        logger.removeHandler(handler)
        write_results(pipeline, root)
    return "\n".join(said)


def _steps(steps: int, *stages: str) -> list[str]:
    return [f"stages.{stage}.steps={steps}" for stage in stages or TRAININGS]


@pytest.fixture(scope="module")
def folder(workplace: Path) -> Path:
    """A working directory in which the config has run with 40 steps, and then with 60; `fresh` is of 60 at once."""
    _run(workplace)
    shutil.copytree(workplace / "run", workplace / "short", symlinks=True)
    (workplace / "said").write_text(_run(workplace, *_steps(60)))
    assert not _run(workplace, *_steps(60), "root=fresh")
    return workplace


def _marker(root: Path, stage: str, key: str) -> Marker:
    marker = read_marker(root / stage / key)
    assert marker is not None
    return marker


def _bits(step: Path) -> tuple[dict[str, bytes], Any]:
    return {path.name: path.read_bytes() for path in step.glob("*.safetensors")}, read_json(step / "state.json")[
        "progress"
    ]


def _came_from(root: Path, stage: str, key: str) -> tuple[str, int] | None:
    earlier = _marker(root, stage, key).values.get("earlier")
    return earlier and (earlier["artifact"], earlier["step"])


def _name(root: Path, stage: str, key: str) -> str:
    """Of the artifact that users see."""
    return (root / stage / key).resolve().name


def test_it_ends_with_the_bits_of_one_made_at_once(folder: Path) -> None:
    for stage, key in TRAININGS.items():
        longer, fresh = folder / "run" / stage / key, folder / "fresh" / stage / key
        assert find_final(longer).name == find_final(fresh).name
        assert _bits(find_final(longer)) == _bits(find_final(fresh)), stage
        told = [_marker(root, stage, key).values for root in (folder / "run", folder / "fresh")]
        for fact in ("steps", "best_step", "validation_loss", "capped", "max_repeats"):
            assert told[0][fact] == told[1][fact], fact


def test_it_goes_on_from_as_far_as_the_schedule_allows(folder: Path) -> None:
    run, short = folder / "run", folder / "short"
    goes_on = {stage: _came_from(run, stage, key) for stage, key in TRAININGS.items()}
    assert goes_on == {
        "constant": (_name(short, "constant", "generic"), 40),
        "wsd": (_name(short, "wsd", "generic"), 32),
        "cosine": None,
        "stopped": (_name(short, "stopped", "law"), 30),
        "chosen": (_name(short, "chosen", "law"), 40),
    }
    assert saved_steps(short / "wsd/generic") == [32, 40]
    said = (folder / "said").read_text()
    assert "constant/generic: goes on from step 40 of an earlier training of 40 steps" in said
    assert "cosine/generic: does not go on from step 40 of an earlier training of 40 steps" in said
    assert "the learning rates differ from step 3 on, as `schedule.kind: cosine` makes those of 40 steps" in said
    assert "one of the two ends there and validates, and the other does not" in said


def test_the_ledger_shows_both_parts_and_nothing_twice(folder: Path) -> None:
    run, short, fresh = folder / "run", folder / "short", folder / "fresh"
    for stage in ("constant", "wsd"):
        own, at_once = _marker(run, stage, "generic"), _marker(fresh, stage, "generic").cost
        assert own.earlier is not None
        for what in ("tokens", "slots", "flops"):
            assert getattr(own.earlier, what) + getattr(own.cost, what) == getattr(at_once, what)
        parts = [entry for entry in read_json(run / "ledger.json") if entry["task"] == f"{stage}/generic"]
        assert [entry.get("earlier") for entry in parts] == [None, own.values["earlier"]]
        assert [entry["flops"] for entry in parts] == [own.cost.flops, own.earlier.flops]
    assert _marker(run, "constant", "generic").earlier == _marker(short, "constant", "generic").cost
    rows = {root: {row["stage"]: row for row in read_json(root / "results.json")["rows"]} for root in (run, fresh)}
    for stage in ("constant", "wsd", "stopped", "chosen"):
        for what in ("generic_tokens", "generic_flops", "specialization_tokens", "specialization_flops"):
            assert rows[run][stage][what] == rows[fresh][stage][what], (stage, what)


def test_shorter_interrupted_and_damaged(folder: Path, tmp_path: Path) -> None:
    """Fewer steps than there are; a longer training that is killed once it goes on; and an earlier one that is damaged."""
    for path in folder.glob("*.*"):
        shutil.copy(path, tmp_path)
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    run, fresh = tmp_path / "run", folder / "fresh"
    killed = (run / "wsd/generic").resolve()
    for path in (killed / MARKER, killed / "result.json"):
        path.unlink()
    shutil.rmtree(step_folder(killed, 60))
    damaged = step_folder((run / "stopped/law").resolve(), 60) / "model-00000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.unlink()  # it may be shared
    damaged.write_bytes(data)
    models = "stages.perplexity.models=[constant, wsd, stopped]"
    said = _run(tmp_path, *_steps(50, "constant"), *_steps(60, "wsd"), *_steps(75, "stopped"), models)
    shorter = _marker(run, "constant", "generic")
    assert _bits(find_final(run / "constant/generic")) == _bits(step_folder(fresh / "constant/generic", 50))
    assert shorter.values["earlier"]["step"] == 50 and shorter.cost.flops == shorter.cost.tokens == 0
    assert shorter.earlier is not None and shorter.earlier.tokens == shorter.whole_cost.tokens
    whole = _marker(fresh, "constant", "generic").cost  # of 60 steps, whose slots are as their windows
    # Not equal per slot: attention of packed windows is counted by their lengths.
    per_slot = shorter.earlier.flops / shorter.earlier.slots
    assert per_slot == pytest.approx(whole.flops / whole.slots, rel=1e-3)
    assert 0.8 < shorter.earlier.slots / whole.slots < 0.87
    again, once = _marker(run, "wsd", "generic"), _marker(folder / "run", "wsd", "generic")
    assert _bits(find_final(run / "wsd/generic")) == _bits(find_final(fresh / "wsd/generic"))
    assert again.earlier == once.earlier and again.cost.tokens == once.cost.tokens
    assert again.cost.flops > once.cost.flops, "steps that were made twice are paid twice"
    assert f"{damaged.relative_to(tmp_path)}: SHA-256 differs" in said
    assert _came_from(run, "stopped", "law") == (_name(folder / "short", "stopped", "law"), 30)
