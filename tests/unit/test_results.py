"""The table as data, from completion markers that stand for finished tasks."""

import json
import math
import shutil
from pathlib import Path

import pytest

from megatron_specialm.base.artifacts import Cost, Marker, begin_artifact, finish_artifact
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.schema import EvaluateStage, Pipeline, TrainStage
from megatron_specialm.launch.plan import make_plan
from megatron_specialm.launch.results import write_results
from megatron_specialm.launch.tables import results_table


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pipeline, Path]:
    """Every task of the smoke page declared done: training cost 10 tokens, anything 100 FLOPs and 2 seconds."""
    monkeypatch.chdir(tmp_path)
    pipeline = load_pipeline(configs_folder() / "pipelines" / "smoke.yaml")
    for files in (pipeline.text.generic, *pipeline.text.domains.values()):
        for entry in (*files.train, *files.validation, *files.test):
            Path(entry).parent.mkdir(parents=True, exist_ok=True)
            Path(entry).write_text(json.dumps({"text": entry}) + "\n")
    root = tmp_path / "run"
    for number, (name, planned) in enumerate(make_plan(pipeline, root).items()):
        stage = pipeline.stages[name.stage]
        values = {}
        if isinstance(stage, EvaluateStage):
            values = {"parameters": 7, "sets": _sets(pipeline, name.key, number)}
        tokens = 10 if isinstance(stage, TrainStage) else 1000
        begin_artifact(root, *name, digest=planned.digest)
        finish_artifact(root, *name, Marker(planned.digest, Cost(tokens, 100, 2.0, 2.0, "cpu", 1), values, {}))
    return pipeline, root


def _sets(pipeline: Pipeline, key: str, number: int) -> dict[str, dict[str, float]]:
    domain = key.rpartition(".")[2]
    names = ["generic", *pipeline.text.domains] if domain == "generic" else [domain]
    return {name: {"nll": 1.0 + number / 100 + place, "tokens": 50} for place, name in enumerate(names)}


def test_rows_and_costs(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    results = write_results(pipeline, root)
    assert results == json.loads((root / "results.json").read_text())
    rows = {(row["method"], row["domain"], row["finetuned"]): row for row in results["rows"]}
    domain = next(iter(pipeline.text.domains))
    pretrained, tuned = rows["slm", domain, False], rows["slm", domain, True]
    assert pretrained["generic_tokens"] == 10 and pretrained["specialization_tokens"] == 0
    assert tuned["generic_tokens"] == 10 and tuned["specialization_tokens"] == 10
    assert pretrained["perplexity"] == pytest.approx(math.exp(pretrained["nll"]))
    # SLM-is: its clustering is generic, its training is the domain's.
    resampled = rows["slm-is", domain, False]
    assert resampled["generic_tokens"] == 0 and resampled["specialization_tokens"] == 10
    assert resampled["generic_flops"] > pretrained["generic_flops"] - 100
    assert rows["slm-nopt", domain, True]["generic_tokens"] == 0


def test_macro_is_of_the_log_likelihoods(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    results = write_results(pipeline, root)
    for entry in results["macro"]:
        own = [
            row["nll"]
            for row in results["rows"]
            if (row["method"], row["finetuned"]) == (entry["method"], entry["finetuned"]) and row["domain"] != "generic"
        ]
        assert len(own) == len(pipeline.text.domains)
        assert entry["perplexity"] == pytest.approx(math.exp(sum(own) / len(own)))


def test_what_rests_on_something_gone_has_no_row(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    before = write_results(pipeline, root)["rows"]
    shutil.rmtree(root / "slm")  # its folder and its marker
    after = write_results(pipeline, root)["rows"]
    rest = {"slm-is", "slm-nopt", "slm-mix", "slm-pn", "slm-pn-soup", "llm", "llm-lora"}
    assert {row["method"] for row in before} == rest | {"slm", "slm-d"}
    assert {row["method"] for row in after} == rest


def test_markdown_has_a_line_per_method_and_state(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    lines = results_table(write_results(pipeline, root)).markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]].count("slm") == 2
