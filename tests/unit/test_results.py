"""The table as data, from completion markers that stand for finished tasks."""

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_specialm.base.artifacts import Cost, Marker, artifact_link, begin_artifact, finish_artifact, read_marker
from megatron_specialm.cli import app
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.schema import AssignStage, EvaluateStage, Pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.graph.plan import make_plan, write_resolved
from megatron_specialm.graph.tasks import evaluated_set, model_task
from megatron_specialm.report.results import write_results
from megatron_specialm.report.seeds import merge_seeds, read_runs
from megatron_specialm.report.tables import results_table
from tests.unit.test_figures import columns

SMOKE = configs_folder() / "pipelines" / "smoke.yaml"


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Pipeline, Path]:
    monkeypatch.chdir(tmp_path)
    return declare_finished(tmp_path)


def declare_finished(folder: Path, *overrides: str) -> tuple[Pipeline, Path]:
    """Every task of the smoke config declared done: training cost 10 tokens in 40 slots, anything 100 FLOPs and 2 seconds."""
    root = folder / "run"
    pipeline = load_pipeline(SMOKE, [f"root={root}", *overrides])
    write_resolved(pipeline, root)
    for files in (pipeline.text.generic, *pipeline.text.domains.values()):
        for entry in (*files.train, *files.validation, *files.test):
            Path(entry).parent.mkdir(parents=True, exist_ok=True)
            Path(entry).write_text("".join(json.dumps({"text": f"{entry} {n}"}) + "\n" for n in range(8)))
    for number, (name, planned) in enumerate(make_plan(pipeline, root).items()):
        stage = pipeline.stages[name.stage]
        values = {}
        if isinstance(stage, EvaluateStage):
            values = {"parameters": 7, "sets": _sets(pipeline, name.key, number)}
        if isinstance(stage, AssignStage):
            values = {"k": 16, "windows": 40, "top_share": 0.5, "entropy": 1.5, "effective_clusters": math.exp(1.5)}
        tokens, slots = (10, 40) if isinstance(stage, TrainStage) else (1000, 1000)
        begin_artifact(root, *name, digest=planned.digest)
        finish_artifact(root, *name, Marker(planned.digest, Cost(tokens, 100, 2.0, 2.0, "cpu", 1, slots), values, {}))
    return pipeline, root


def _sets(pipeline: Pipeline, key: str, number: int) -> dict[str, dict[str, float]]:
    name = evaluated_set(key)
    place = ["generic", *pipeline.text.domains].index(name) if model_task(key).key == "generic" else 0
    return {name: {"nll": 1.0 + number / 100 + place, "tokens": 50}}


def test_rows_and_costs(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    results = write_results(pipeline, root)
    parts = {name: columns(own) for name, own in vars(results).items() if name != "pipeline"}
    assert {"pipeline": pipeline.name, **parts} == json.loads((root / "results.json").read_text())
    rows = {(row["method"], row["domain"], row["finetuned"]): row for row in columns(results.rows)}
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


def test_slots_and_fill_stand_beside_tokens(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    results = write_results(pipeline, root)
    for row in columns(results.rows):
        assert (row["generic_slots"], row["specialization_slots"]) == (
            4 * row["generic_tokens"],
            4 * row["specialization_tokens"],
        )
        assert row["fill"] == 0.25
    assert {entry["fill"] for entry in columns(results.macro)} == {0.25}
    table = results_table(results)
    assert {line[table.header.index("fill")] for line in table.lines} == {"25%"}
    assert {entry["slots"] for entry in json.loads((root / "ledger.json").read_text())} == {40, 1000}


def test_the_domain_in_pretraining_is_told_from_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    early = "{kind: train, data: generic, domain_fraction: 0.1, model: nano, steps: 20, global_batch_size: 8}"
    pipeline, root = declare_finished(
        tmp_path,
        f"stages.early={early}",
        "stages.slm-tuned.init=early",
        "stages.perplexity.models=[slm, early, slm-tuned]",
    )
    results = write_results(pipeline, root)
    facts = {row["stage"]: (row["finetuned"], row["domain_text"]) for row in columns(results.rows)}
    assert facts == {"slm": (False, "none"), "early": (True, "mixed in"), "slm-tuned": (True, "fine-tuned")}
    table = results_table(results)
    assert [line[:2] for line in table.lines] == [["slm", "no"], ["early", "mixed in"], ["early", "yes"]]


def test_what_decides_nothing_is_in_the_ledger_and_in_no_models_cost(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    before = columns(write_results(pipeline, root).rows)
    marker = read_marker(artifact_link(root, "slm-mix-chosen", "scipy"))
    assert marker is not None
    apart = Cost(0, 10**9, 50.0, 50.0, "cpu", 1)
    finish_artifact(root, "slm-mix-chosen", "scipy", dataclasses.replace(marker, apart=apart))
    assert read_marker(artifact_link(root, "slm-mix-chosen", "scipy")) == dataclasses.replace(marker, apart=apart)
    assert columns(write_results(pipeline, root).rows) == before
    ledger = [e for e in json.loads((root / "ledger.json").read_text()) if e["task"] == "slm-mix-chosen/scipy"]
    assert [(entry["phase"], entry["flops"]) for entry in ledger] == [("specialization", 100), ("comparison", 10**9)]


def test_macro_is_of_the_log_likelihoods(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    results = write_results(pipeline, root)
    for entry in columns(results.macro):
        own = [
            row["nll"]
            for row in columns(results.rows)
            if (row["method"], row["finetuned"]) == (entry["method"], entry["finetuned"]) and row["domain"] != "generic"
        ]
        assert len(own) == len(pipeline.text.domains)
        assert entry["perplexity"] == pytest.approx(math.exp(sum(own) / len(own)))


def test_what_rests_on_something_gone_has_no_row(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    before = columns(write_results(pipeline, root).rows)
    shutil.rmtree(root / "artifacts/slm")
    after = columns(write_results(pipeline, root).rows)
    rest = {"slm-is", "slm-nopt", "slm-mix", "slm-pn", "slm-pn-soup", "llm", "llm-lora"}
    assert {row["method"] for row in before} == rest | {"slm", "slm-d"}
    assert {row["method"] for row in after} == rest


def test_markdown_has_a_line_per_method_and_state(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    lines = results_table(write_results(pipeline, root)).markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[1].strip() for line in lines[2:]].count("slm") == 2


def _declare_capped(root: Path, stage: str, *, steps: int = 20, **capped: bool) -> None:
    """What a training with early stopping leaves in its marker."""
    for key, is_capped in capped.items():
        marker = read_marker(artifact_link(root, stage, key))
        assert marker is not None
        values = {"steps": steps, "best_step": steps, "capped": is_capped}
        finish_artifact(root, stage, key, dataclasses.replace(marker, values=values))


def test_what_the_cap_ended_is_marked(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    plain = results_table(write_results(pipeline, root))
    assert plain.note == "" and "*" not in plain.markdown()
    _declare_capped(root, "slm-tuned", scipy=True, sklearn=False, torch=False)
    _declare_capped(root, "llm-tuned", scipy=False, sklearn=False, torch=False)
    _declare_capped(root, "llm-tuned", scipy=True)  # the teacher of slm-d, which has rows of its own
    _declare_capped(root, "slm-d", scipy=False, sklearn=False, torch=False)
    results = write_results(pipeline, root)
    capped = {(row["stage"], row["domain"]): row["capped"] for row in columns(results.rows)}
    assert [name for name, value in capped.items() if value] == [("slm-tuned", "scipy"), ("llm-tuned", "scipy")]
    assert capped["slm-tuned", "torch"] is False and capped["slm-d", "scipy"] is False
    assert capped["slm", "scipy"] is None and capped["slm-nopt", "scipy"] is None
    assert {entry["stage"]: entry["capped"] for entry in columns(results.macro) if entry["capped"] is not None} == {
        "slm-tuned": True, "llm-tuned": True, "slm-d": False,
    }  # fmt: skip
    lines = {line["stage"] + line["domain"]: line["capped"] for line in csv.DictReader((root / "results.csv").open())}
    assert (lines["slm-tunedscipy"], lines["slm-tunedtorch"], lines["slmscipy"]) == ("True", "False", "")
    table = results_table(results)
    marked = {
        (line[0], line[1], head)
        for line in table.lines
        for head, cell in zip(table.header, line, strict=True)
        if "*" in cell
    }
    assert marked == {(method, "yes", column) for method in ("slm", "llm") for column in ("scipy", "macro")}
    for column in ("scipy", "macro"):  # digits below digits: where there is no mark there is room
        cells = [line[table.header.index(column)] for line in table.lines]
        assert {cell[-1] for cell in cells if cell} == {" ", "*"}
    assert table.note == "* ended by the cap on steps, not by early stopping: allow more steps in slm-tuned, llm-tuned"
    assert (root / "results.md").read_text() == table.markdown()
    assert table.markdown().endswith(" |\n\n\\" + table.note + "\n")  # behind a backslash: it is no list
    perplexities, costs = table.in_two("gen. tokens", ("", ""))
    assert perplexities.note and not costs.note


def _declare_bytes(root: Path, stage: str, **known: int | bool) -> None:
    """Let the evaluations of a stage's models have recorded these values beside the loss."""
    for link in (root / "perplexity").glob(f"{stage}.*"):
        marker = read_marker(link)
        assert marker is not None
        sets = {
            name: {**score, "nats": score["nll"] * score["tokens"], **known}
            for name, score in marker.values["sets"].items()
        }
        values = {**marker.values, "sets": sets}
        finish_artifact(root, "perplexity", link.name, dataclasses.replace(marker, values=values))


def test_bits_per_byte_are_there_where_bytes_are_known(finished: tuple[Pipeline, Path], tmp_path: Path) -> None:
    pipeline, root = finished
    before = results_table(write_results(pipeline, root))
    assert "bits/byte" not in before.header
    _declare_bytes(root, "slm-tuned", bytes=200, bytes_estimated=False)
    results = write_results(pipeline, root)
    rows = [row for row in columns(results.rows) if row["stage"] == "slm-tuned"]
    assert [row["bits_per_byte"] for row in rows] == pytest.approx(
        [row["nll"] * 50 / math.log(2) / 200 for row in rows]
    )
    assert {row["bits_per_byte"] for row in columns(results.rows) if row["stage"] != "slm-tuned"} == {None}
    table = results_table(results)
    cells = {(*line[:2],): line[table.header.index("bits/byte")] for line in table.lines}
    assert float(cells.pop(("slm", "yes"))) == pytest.approx(sum(row["bits_per_byte"] for row in rows) / 3, abs=1e-3)
    assert set(cells.values()) == {"-"}
    assert table.without("bits/byte") == before

    # Over seeds it is known if it is for each.
    results.write(tmp_path / "first.json")
    other = json.loads((tmp_path / "first.json").read_text())
    for part in ("rows", "macro", "concentration"):
        other[part] = [{**entry, "seed": 1} for entry in other[part]]
    (tmp_path / "second.json").write_text(json.dumps(other))
    merged = {
        entry["stage"]: entry
        for entry in columns(merge_seeds(read_runs([tmp_path / "first.json", tmp_path / "second.json"])).macro)
    }
    assert merged["slm-tuned"]["bits_per_byte_sd"] == 0 and merged["slm-tuned"]["bits_per_byte"] > 0
    assert merged["llm-tuned"]["bits_per_byte"] is merged["llm-tuned"]["bits_per_byte_sd"] is None

    _declare_bytes(root, "slm-tuned", bytes=200, bytes_estimated=True)
    assert "bits/byte: estimated" in results_table(write_results(pipeline, root)).note


@pytest.mark.parametrize("command", ["run", "results"])
def test_commands_warn_of_the_cap(finished: tuple[Pipeline, Path], command: str) -> None:
    _, root = finished
    arguments = [command, str(SMOKE), f"root={root}"]
    assert "warning" not in CliRunner().invoke(app, arguments).output
    _declare_capped(root, "slm-tuned", steps=30, scipy=True, sklearn=True, torch=False)
    _declare_capped(root, "llm-tuned", scipy=False, sklearn=False, torch=True)
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    warnings = [line for line in outcome.output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2  # a line per stage
    (of_slm,) = (line for line in warnings if "slm-tuned/scipy (30 steps" in line)
    assert (
        "slm-tuned/sklearn" in of_slm and "slm-tuned/torch" not in of_slm and "raise stages.slm-tuned.steps" in of_slm
    )
    assert "* ended by the cap on steps" in outcome.output
    stale = CliRunner().invoke(
        app, [*arguments, "stages.slm-tuned.steps=31", *["--until", "llm-tuned"] * (command == "run")]
    )
    assert "slm-tuned" not in "".join(line for line in stale.output.splitlines() if "warning" in line), (
        "it is of other settings"
    )


def test_total_costs(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    for row in write_results(pipeline, root).rows:
        own = row.columns()
        for what in ("flops", "device_seconds"):
            for tasks in (1, 7, 50):
                total = own[f"generic_{what}"] + tasks * own[f"specialization_{what}"]
                assert own[f"total_{what}_{tasks}"] == row.total(what, domains=tasks) == total


def test_files_beside_the_results(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    results = write_results(pipeline, root)
    lines = list(csv.DictReader((root / "results.csv").open()))
    assert len(lines) == len(results.rows) and list(lines[0]) == list(columns(results.rows)[0])
    assert [float(line["perplexity"]) for line in lines] == [row["perplexity"] for row in columns(results.rows)]
    assert (root / "results.md").read_text() == results_table(results).markdown()
    assert "stage" not in results_table(results).header and "set size" not in results_table(results).header


def test_concentration_and_selection_come_from_markers(finished: tuple[Pipeline, Path]) -> None:
    pipeline, root = finished
    marker = read_marker(artifact_link(root, "slm-mix-chosen", "scipy"))
    assert marker is not None
    told = {"choice": "c3", "by": "loss", "criteria": {"loss": {"choice": "c3", "rank": 1, "tokens": 64, "flops": 9}}}
    finish_artifact(root, "slm-mix-chosen", "scipy", dataclasses.replace(marker, values=told))
    results = write_results(pipeline, root)
    stages = ("assignment", "assignment-8", "assignment-4")
    sets = [(stage, name) for stage in stages for name in ("generic", *pipeline.text.domains)]
    assert [(entry["stage"], entry["domain"]) for entry in columns(results.concentration)] == sets
    assert columns(results.selection) == [
        {
            "method": "slm-mix", "stage": "slm-mix-chosen", "domain": "scipy", "base_domain": "scipy", "size": None,
            "choice": "c3", "by": "loss", "criterion": "loss", "criterion_choice": "c3", "rank": 1,
            "tokens": 64, "slots": None, "flops": 9, "seconds": None, "seed": 0, "training_seed": 0,
        }
    ]  # fmt: skip


def test_sizes_and_budgets_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = [f"text.domains.{name}.sizes=[1000, 5000]" for name in ("scipy", "sklearn", "torch")]
    longer = "{kind: train, data: domain, init: slm, steps: 60, global_batch_size: 8, schedule: {warmup_steps: 5}}"
    pipeline, root = declare_finished(
        tmp_path, *sizes, f"stages.slm-longer={longer}", "stages.perplexity.models=[slm, slm-tuned, slm-longer]"
    )
    results = write_results(pipeline, root)
    row = next(row for row in columns(results.rows) if row["domain"] == "torch-5k" and row["stage"] == "slm-longer")
    assert (row["method"], row["base_domain"], row["size"]) == ("slm", "torch", 5000)
    tuned = [(entry["stage"], entry["size"]) for entry in columns(results.macro) if entry["finetuned"]]
    assert tuned == [(stage, size) for stage in ("slm-tuned", "slm-longer") for size in (1000, 5000)]
    for entry in columns(results.macro):
        own = [row for row in columns(results.rows) if (row["stage"], row["size"]) == (entry["stage"], entry["size"])]
        own = [row for row in own if row["domain"] != "generic"]
        assert [row["base_domain"] for row in own] == ["scipy", "sklearn", "torch"]
        assert entry["perplexity"] == pytest.approx(math.exp(sum(row["nll"] for row in own) / 3))
    table = results_table(results)
    assert table.header[:8] == ["method", "fine-tuned", "stage", "set size", "generic", "scipy", "sklearn", "torch"]
    assert [line[:4] for line in table.lines] == [
        ["slm", "no", "slm", ""], ["slm", "yes", "slm-tuned", "1k"], ["slm", "yes", "slm-tuned", "5k"],
        ["slm", "yes", "slm-longer", "1k"], ["slm", "yes", "slm-longer", "5k"],
    ]  # fmt: skip


def test_figures_from_the_command_line(finished: tuple[Pipeline, Path], tmp_path: Path) -> None:
    _, root = finished
    CliRunner().invoke(app, ["results", str(SMOKE), f"root={root}"])
    other = json.loads((root / "results.json").read_text())
    for part in ("rows", "macro", "concentration"):
        other[part] = [{**entry, "seed": 1} for entry in other[part]]
    (tmp_path / "seed-1").mkdir()
    (tmp_path / "seed-1" / "results.json").write_text(json.dumps(other))
    for options, says in (([], "| slm | no |"), (["--runs", str(tmp_path / "seed-1")], "± 0.0 |")):
        outcome = CliRunner().invoke(app, ["figures", str(SMOKE), f"root={root}", *options])
        assert outcome.exit_code == 0, outcome.output
        paths = [Path(line) for line in outcome.output.splitlines()]
        assert root / "figures" / "generic-cost-flops.svg" in paths and all(path.is_file() for path in paths)
        assert says in (root / "figures" / "results.md").read_text()
