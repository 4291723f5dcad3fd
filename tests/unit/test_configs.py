"""The shipped configs hold together: each loads, its graph builds, and what it would train can be said."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from megatron_specialm.base.accelerator import planned_machine
from megatron_specialm.base.artifacts import Cost, Marker, begin_artifact, finish_artifact
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.schedule import step_to_keep
from megatron_specialm.estimate.parameters import count_parameters, count_trained_parameters
from megatron_specialm.estimate.setup import Passes
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.lineage import distinct_setups, setup_of, train_stage
from megatron_specialm.graph.plan import PlannedTask, make_plan
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.report.estimates import memory_table, stage_flops, training_table
from megatron_specialm.run.preflight import lacks

CONFIGS = sorted((configs_folder() / "pipelines").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_config_holds_together_and_says_what_it_would_train(config: Path) -> None:
    pipeline = load_pipeline(config)
    machine = planned_machine("A100")
    assert len(build_graph(pipeline)) > len(pipeline.stages)
    assert not list(lacks(pipeline, machine))
    console = Console(width=200, record=True)
    console.print(training_table(pipeline, machine), memory_table(pipeline, machine))
    said = console.export_text()
    assert all(name in said for name in distinct_setups(pipeline, None))


def test_fill_and_validations_are_told_where_the_text_is_tokenized(tmp_path: Path) -> None:
    pipeline = load_pipeline(configs_folder() / "pipelines" / "smoke.yaml", [f"root={tmp_path}"])
    machine, graph = planned_machine("A100"), build_graph(pipeline)
    plan, other = ({name: PlannedTask(task, digest, "done", {}) for name, task in graph.items()} for digest in "de")

    def said() -> str:
        console = Console(width=200, record=True)
        console.print(training_table(pipeline, machine, plan))
        return console.export_text()

    assert "%)" not in said()
    setup, before = setup_of(pipeline, "slm-tuned"), stage_flops(pipeline, "slm-tuned", plan)
    assert before == 3 * 30 * setup.step_flops
    for source, windows in {"generic": 100, "scipy": 9, "sklearn": 17, "torch": 8}.items():
        values = {
            "tokens": {"train": 1600 if source == "generic" else 640, "validation": 20 * windows},
            "windows": {"train": 50, "validation": windows},
        }
        marker = Marker("d", Cost(0, 0, 0.0, 0.0, "cpu", 1), values, {})
        begin_artifact(tmp_path, "tokens", source, digest="d")
        finish_artifact(tmp_path, "tokens", source, marker)
    assert "0.16M" in said() and "(50%)" in said() and "(20%)" in said()  # of 160 steps of 16 windows of 64 slots
    # Validations: before the first step and at three more, of two, three and one batches of eight windows.
    evaluated = Passes(evaluated=4 * (2 + 3 + 1) * 8 * 64)
    assert stage_flops(pipeline, "slm-tuned", plan) == before + setup.flops(evaluated)
    layout = "stages.slm-tuned.parallel={data_parallel: 2, pipeline_parallel: 2}"
    spread = load_pipeline(
        configs_folder() / "pipelines" / "smoke.yaml",
        [f"root={tmp_path}", layout, "stages.slm-tuned.micro_batch_size=2"],
    )
    # Batches of two windows: five, nine and four on two copies are three, five and two each, in multiples of two stages.
    evaluated = Passes(evaluated=4 * 2 * (4 + 6 + 2) * 2 * 64)
    assert stage_flops(spread, "slm-tuned", plan) == before + setup.flops(evaluated)
    assert stage_flops(pipeline, "slm", plan) == 160 * setup_of(pipeline, "slm").step_flops, "it is not validated"
    packed = load_pipeline(
        configs_folder() / "pipelines" / "smoke.yaml",
        [
            f"root={tmp_path}",
            "stages.slm.packing=packed",
            "stages.slm-tuned.packing=packed",
            "stages.slm-pn.packing=packed",
        ],
    )
    # 16 windows of 32 tokens on average; each of them reads 32 keys less than where windows are padded to 64.
    assert stage_flops(packed, "slm", plan) == 160 * setup_of(packed, "slm").step_flops_of(16 * 32, 16 * 32 * 32)
    # 34 windows of 20 tokens are validated four times; of 50 windows a domain, 640 tokens are read in 8 windows a step.
    evaluated = Passes(evaluated=4 * 34 * 20, evaluated_saved=4 * 34 * 20 * 44)
    steps = 3 * 30 * setup_of(packed, "slm-tuned").step_flops_of(8 * 64 // 5, 8 * 12 * 52)
    assert stage_flops(packed, "slm-tuned", plan) == steps + setup.flops(evaluated)
    # In a pipeline the packed micro-batches of different experts have one length, so padding.
    staged = [f"root={tmp_path}", "stages.slm-pn.packing=packed", "stages.slm-pn.parallel.pipeline_parallel=2"]
    in_stages = load_pipeline(configs_folder() / "pipelines" / "smoke.yaml", staged)
    padded = setup_of(in_stages, "slm-pn").step_flops
    steps = train_stage(pipeline, "slm-pn").steps
    assert stage_flops(in_stages, "slm-pn", plan) == steps * padded > stage_flops(packed, "slm-pn", plan)
    longer = {
        **pipeline.stages,
        "slm-320": pipeline.stages["slm"].model_copy(update={"steps": 320, "continues": "slm"}),
    }
    continued = pipeline.model_copy(update={"stages": longer})
    taken_over = step_to_keep(train_stage(pipeline, "slm")) or 160
    assert stage_flops(continued, "slm-320") == (320 - taken_over) * setup_of(pipeline, "slm").step_flops
    assert stage_flops(pipeline, "slm-tuned", other) == before, "what was tokenized from other settings is not read"


def test_the_papers_config_is_planned_with_its_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it on a stand-in for its files: models, budgets and cluster counts are the paper's (Tables 1, 6 and 7)."""
    monkeypatch.chdir(tmp_path)
    pipeline = load_pipeline(configs_folder() / "pipelines" / "paper.yaml")
    for files in (pipeline.text.generic, *pipeline.text.domains.values()):
        for entry in (*files.train, *files.validation, *files.test):
            for number in range(files.shards):
                path = tmp_path / re.sub(r"\[(\d)-\d\]", r"\1", entry).replace("*", f"{number:05d}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(entry.encode())
    plan = make_plan(pipeline, tmp_path / "run")
    assert len(pipeline.text.domains) == 9 * 3 and {planned.state for planned in plan.values()} == {"to do"}
    assert sum(name.stage == "slm-mix" for name in plan) == 16
    assert (
        sum(name.key.startswith("generic.") for name in plan if name.stage == "vectors") == 256 + 1
    )  # and the encoder
    assert TaskId("slm-is", "wikipedia-64m") in plan and TaskId("slm-d", "arxiv-1m") in plan
    slm, llm, network = (setup_of(pipeline, name) for name in ("slm", "llm", "slm-pn"))
    assert count_trained_parameters(network.model, 32_000) == pytest.approx(1_422e6, rel=0.05)  # Table 6: 32 experts
    small = count_parameters(slm.model, 32_000)
    assert count_parameters(network.model.base_config, 32_000) == small == pytest.approx(126e6, rel=0.05)
    assert count_parameters(llm.model, 32_000) == pytest.approx(771e6, rel=0.05)
    # 600 hours each at the paper's speeds: 2.2, 7.7 and 3.6 A100 hours per 1B tokens.
    for name, speed in {"slm": 2.2, "llm": 7.7, "slm-pn": 3.6}.items():
        stage, setup = pipeline.stages[name], setup_of(pipeline, name)
        assert stage.steps * setup.global_batch_size * setup.context_length / 1e9 * speed == pytest.approx(
            600, rel=0.01
        )
