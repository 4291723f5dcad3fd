"""Several learning rates of one training: the tasks that try them, their digests, jobs and costs, and what is refused."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_specialm.base.artifacts import Cost, Marker, artifact_link, begin_artifact, finish_artifact, read_marker
from megatron_specialm.base.errors import ArtifactError, CheckpointError, ConfigError, TrainingError
from megatron_specialm.checkpoint.adopting import adopt_checkpoints
from megatron_specialm.checkpoint.opening import newest_checkpoint
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import step_folder
from megatron_specialm.config.finetuning import finetuning_recipe
from megatron_specialm.config.load import configs_folder, dump_pipeline, load_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.site import Site
from megatron_specialm.config.training import TrainStage
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.lineage import setup_of
from megatron_specialm.graph.plan import make_plan, select_tasks
from megatron_specialm.graph.rates import at_rate, beyond, trial_of
from megatron_specialm.graph.tasks import TaskId, ancestors
from megatron_specialm.report.estimates import stage_flops
from megatron_specialm.report.results import write_results
from megatron_specialm.slurm.jobs import jobs_of
from megatron_specialm.stages.rates import choose_rate
from tests.contexts import make_context
from tests.texts import write_smoke_names
from tests.unit.test_results import declare_finished

SMOKE = configs_folder() / "pipelines" / "smoke.yaml"
RATES = "stages.slm-tuned.optimizer.learning_rate=[0.0005, 0.0017]"
STOPPING = "stages.slm-tuned.early_stopping={evaluate_every: 8, patience: 2}"  # of 30 steps
BRIEFLY = "stages.slm-tuned.trial_steps=10"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the smoke config's files."""
    monkeypatch.chdir(tmp_path)
    write_smoke_names(tmp_path)
    return tmp_path


def _load(*overrides: str) -> Pipeline:
    return load_pipeline(SMOKE, [STOPPING, *overrides])


def _stage(pipeline: Pipeline) -> TrainStage:
    stage = pipeline.stages["slm-tuned"]
    assert isinstance(stage, TrainStage)
    return stage


def _digests(*overrides: str) -> dict[str, str]:
    return {str(name): planned.digest for name, planned in make_plan(_load(*overrides), Path("run")).items()}


# --- the config ---------------------------------------------------------------------------------------------------------


def test_a_list_of_one_is_the_rate_itself() -> None:
    assert _load("stages.slm-tuned.optimizer.learning_rate=[3.0e-4]") == _load(
        "stages.slm-tuned.optimizer.learning_rate=3.0e-4"
    )


def test_a_resolved_config_has_the_list(tmp_path: Path) -> None:
    pipeline = _load(RATES, BRIEFLY)
    (tmp_path / "resolved.yaml").write_text(dump_pipeline(pipeline))
    assert load_pipeline(tmp_path / "resolved.yaml") == pipeline


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stages.slm-tuned.optimizer.learning_rate=[]"], r"slm-tuned\.optimizer\.learning_rate: give one number.*got \[\]"),
        (["stages.slm-tuned.optimizer.learning_rate=[1e-3, 0.001]"], r"optimizer\.learning_rate: .*different ones"),
        (["stages.slm-tuned.optimizer.learning_rate=[1e-3, x]"], r"optimizer\.learning_rate\.1: .*number .*got 'x'"),
        (["stages.slm-tuned.optimizer.learning_rate=[1e-3, true]"], r"optimizer\.learning_rate\.1: .*got True"),
        (["stages.slm-tuned.optimizer.learning_rate=[1e-3, -1]"], r"optimizer\.learning_rate\.1: .*greater than 0"),
        (["stages.slm-tuned.optimizer.learning_rate=x"], r"slm-tuned\.optimizer\.learning_rate: .*number .*got 'x'"),
        ([RATES, "stages.slm-tuned.early_stopping=null"], r"slm-tuned: `optimizer.learning_rate` \[0\.0005, 0\.0017\]: "
         ".*validation loss: give `early_stopping`"),
        ([BRIEFLY], r"slm-tuned: `trial_steps` 10 goes with several rates in `optimizer.learning_rate`"),
        (["stages.slm-mix-chosen.trial.optimizer.learning_rate=[1e-3, 2e-3]"], r"trial\.optimizer\.learning_rate: .*number"),
    ],
)  # fmt: skip
def test_what_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        _load(*overrides)
    assert len(str(refused.value).splitlines()) == 1


def test_a_recipe_scales_every_rate_and_shortens_trials() -> None:
    stage = _stage(_load(RATES, BRIEFLY, "stages.slm-tuned.recipe=paper", "stages.slm-tuned.steps=9000"))
    made = finetuning_recipe(stage, set_tokens=50_000)
    assert made.optimizer.rates == pytest.approx([0.0005 / 3, 0.0017 / 3]) and made.steps == 2_000
    tried = finetuning_recipe(trial_of(stage, 0.0017), set_tokens=50_000)
    assert tried.optimizer.peak == pytest.approx(0.0017 / 3) and tried.trial_steps == 16


def test_rates_are_compared_at_a_validation() -> None:
    for given, until in ((1, 8), (8, 8), (9, 16), (24, 24), (25, None), (90, None)):
        stage = _stage(_load(RATES, f"stages.slm-tuned.trial_steps={given}"))
        assert trial_of(stage, 0.0005).trial_steps == until
        assert at_rate(stage, 0.0005).trial_steps is None
    assert [beyond(rate, [3, 1, 2]) for rate in (1, 2, 3)] == ["lower", None, "higher"]


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_each_rate_is_a_task_that_the_training_reads() -> None:
    mixed = ["stages.slm-mix.optimizer.learning_rate=[0.1, 0.2]", "stages.slm-mix.early_stopping={evaluate_every: 8}"]
    graph = build_graph(_load(RATES, *mixed))
    alone = build_graph(_load())
    order = list(graph)
    for model, rates in (
        (TaskId("slm-tuned", "torch"), ("0.0005", "0.0017")),
        (TaskId("slm-mix", "c1"), ("0.1", "0.2")),
    ):
        trials = [TaskId(model.stage, f"{model.key}.rate-{rate}") for rate in rates]
        assert graph[model].inputs[-2:] == tuple(trials)
        for trial in trials:
            assert graph[trial].inputs == graph[model].inputs[:-2]
            assert graph[trial].domain == graph[model].domain and order.index(trial) < order.index(model)
    assert graph[TaskId("slm-tuned", "torch")].inputs[:-2] == alone[TaskId("slm-tuned", "torch")].inputs
    # What is made from the model, or scores it, knows nothing of trials but through it.
    readers = [name for name, task in graph.items() if any(".rate-" in other.key for other in task.inputs)]
    assert all(name.stage in ("slm-tuned", "slm-mix") for name in readers)


def test_a_trials_digest_is_of_its_own_rate_and_of_what_it_does(text: Path) -> None:
    before, changed = _digests(RATES), _digests("stages.slm-tuned.optimizer.learning_rate=[0.0017, 0.01, 0.0005]")
    trials = [name for name in before if ".rate-" in name]
    assert len(trials) == 6 and all(before[name] == changed[name] for name in trials)
    assert before["slm-tuned/torch"] != changed["slm-tuned/torch"]
    late, early = _digests(RATES, "stages.slm-tuned.trial_steps=25"), _digests(RATES, BRIEFLY)
    assert all(before[name] == late[name] for name in trials), "to the end either way"
    assert all(before[name] != early[name] for name in trials)
    assert early == {**early, **{name: _digests(RATES, "stages.slm-tuned.trial_steps=16")[name] for name in trials}}


def test_keys_of_a_training_bring_its_trials(text: Path) -> None:
    plan = make_plan(_load(RATES), Path("run"))
    chosen = select_tasks(plan, only="slm-tuned", until=None, keys=["torch"], check_inputs=False)
    assert [name.key for name in chosen] == ["torch.rate-0.0005", "torch.rate-0.0017", "torch"]
    done = {
        name: dataclasses.replace(planned, state="done" if name.stage != "slm-tuned" else "to do")
        for name, planned in plan.items()
    }
    assert len(select_tasks(done, only="slm-tuned", until=None)) == 9, (
        "what a task reads of its own stage is run with it"
    )


def test_trials_are_a_wave_before_the_models(text: Path) -> None:
    pipeline = _load(RATES)
    plan = make_plan(pipeline, Path("run"))
    jobs = {job.name: job for job in jobs_of(pipeline, Site.model_validate({}), plan)}
    trials, models = jobs["slm-tuned"], jobs["slm-tuned.1"]
    assert sum(len(element) for element in trials.elements) == 6
    assert [record.key for element in models.elements for record in element] == ["scipy", "sklearn", "torch"]
    assert list(jobs).index("slm-tuned") < list(jobs).index("slm-tuned.1")
    assert trials.element_of(TaskId("slm-tuned", "torch.rate-0.0017")) is not None
    assert TaskId("slm-tuned", "torch.rate-0.0017") in models.inputs


# --- costs ------------------------------------------------------------------------------------------------------------


def test_trials_are_charged_to_the_model_and_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [STOPPING, "stages.perplexity.models=[slm, slm-tuned]"]
    costs = {}
    for name, more in (("one", []), ("two", [RATES])):
        pipeline, root = declare_finished(tmp_path / name, *overrides, *more)
        rows = {(row.stage, row.domain): row.columns() for row in write_results(pipeline, root).rows}
        costs[name] = rows["slm-tuned", "torch"]
        assert rows["slm", "torch"]["specialization_tokens"] == 0
    for cost, own in (("tokens", 10), ("slots", 40), ("flops", 100), ("device_seconds", 2.0)):
        assert costs["two"][f"specialization_{cost}"] == costs["one"][f"specialization_{cost}"] + 2 * own
        assert costs["two"][f"generic_{cost}"] == costs["one"][f"generic_{cost}"]
    ledger = json.loads((root / "ledger.json").read_text())
    phases = {entry["phase"] for entry in ledger if entry["task"].startswith("slm-tuned/torch.rate-")}
    assert phases == {"specialization"}
    step = setup_of(pipeline, "slm-tuned").step_flops
    assert stage_flops(_load(RATES), "slm-tuned") == 3 * 2 * 30 * step
    assert stage_flops(_load(RATES, BRIEFLY), "slm-tuned") == 3 * (30 + 16) * step


def test_the_rate_taken_stands_in_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline, root = declare_finished(tmp_path, STOPPING, RATES, "stages.perplexity.models=[slm, slm-tuned]")
    taken = {"scipy": 0.0005, "sklearn": 0.0017, "torch": 0.0017}
    for domain, rate in taken.items():
        marker = read_marker(artifact_link(root, "slm-tuned", domain))
        assert marker is not None
        values = {"learning_rate": rate, "chosen_rate": rate, "learning_rates": {"0.0005": 3.1, "0.0017": None}}
        finish_artifact(root, "slm-tuned", domain, dataclasses.replace(marker, values=values))
    results = write_results(pipeline, root)
    rows = {row.domain: row.learning_rate for row in results.rows if row.stage == "slm-tuned"}
    assert rows == taken
    macro = {entry.stage: entry.learning_rate for entry in results.macro}
    assert macro == {"slm": None, "slm-tuned": "0.0005, 0.0017"}
    assert [(entry.domain, entry.learning_rate, entry.validation_loss) for entry in results.learning_rates] == [
        (domain, rate, loss) for domain in taken for rate, loss in ((0.0005, 3.1), (0.0017, None))
    ]
    assert {entry.untried for entry in results.learning_rates} == {"lower", "higher"}


def test_a_models_ancestors_are_its_own_trials() -> None:
    graph = build_graph(_load(RATES))
    found = [name.key for name in ancestors(graph, TaskId("slm-tuned", "torch")) if name.stage == "slm-tuned"]
    assert found == ["torch.rate-0.0005", "torch.rate-0.0017", "torch"]


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "taken"), [((3.1, 3.0), 0.0017), ((3.0, 3.0), 0.0005), ((None, 9.0), 0.0017), ((None, None), None)]
)
def test_the_lowest_loss_is_taken_and_the_first_of_equal_ones(
    tmp_path: Path, losses: tuple[float | None, ...], taken: float | None
) -> None:
    pipeline = _load(RATES)
    task = build_graph(pipeline)[TaskId("slm-tuned", "torch")]
    for trial, loss in zip(task.inputs[-2:], losses, strict=True):
        begin_artifact(tmp_path, *trial, digest="d")
        cost = Cost(10, 100, 1.0, 2.0, "cpu", 2, 40)
        finish_artifact(tmp_path, *trial, Marker("d", cost, {"validation_loss": loss}, {}))
    context = make_context(pipeline, task, tmp_path, tmp_path / "slm-tuned/torch")
    if taken is None:
        with pytest.raises(TrainingError, match=r"none of the learning rates 0\.0005, 0\.0017 .*slm-tuned\.optimizer"):
            choose_rate(_stage(pipeline), context)
        return
    choice = choose_rate(_stage(pipeline), context)
    assert choice.rate == taken and choice.values["learning_rates"] == dict(
        zip(("0.0005", "0.0017"), losses, strict=True)
    )
    assert choice.values["trials"] == {
        "tokens": 20, "slots": 80, "flops": 200, "wall_seconds": 2.0, "device_seconds": 4.0,
    }  # fmt: skip


# --- taking over a trial's checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    """A finished trial with two steps."""
    for step in (3, 7):
        state = {"progress": {"step": step}, "learning_rate": 0.0017}
        save_checkpoint(
            tmp_path / "trial", step=step, weights={"w": torch.full((4,), float(step))}, optimizer_state={}, state=state
        )
    return tmp_path / "trial"


def _steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_a_killed_take_over_is_finished_and_a_finished_one_left_alone(
    trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def refused(*_: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refused)
    folder = tmp_path / "model"
    (folder / ".step_0000007.0123abcd.tmp").mkdir(parents=True)  # killed while the newest step was copied
    (step_folder(folder, 3)).mkdir()
    adopt_checkpoints(trial, folder)
    assert _steps(folder) == ["step_0000003", "step_0000007"]
    newest, passed_over = newest_checkpoint(folder)
    assert newest == step_folder(folder, 7) and not passed_over
    model = "model-00000.safetensors"
    assert os.path.samefile(newest / model, step_folder(trial, 7) / model) == links
    # The training has gone on since, and dropped what it does not need any more.
    save_checkpoint(folder, step=9, weights={"w": torch.zeros(4)}, optimizer_state={}, state={})
    for name in ("step_0000003", "step_0000007"):
        for path in (folder / name).iterdir():
            path.unlink()
        (folder / name).rmdir()
    adopt_checkpoints(trial, folder)
    assert _steps(folder) == ["step_0000009"]
    assert _steps(trial) == ["step_0000003", "step_0000007"]


def test_steps_of_another_rate_are_refused_and_kept(trial: Path, tmp_path: Path) -> None:
    """A trial that was done again may turn the choice, of a training that another choice has begun."""
    folder = tmp_path / "model"
    for step in (5, 9):
        save_checkpoint(folder, step=step, weights={}, optimizer_state={}, state={"learning_rate": 0.0005})
    with pytest.raises(
        CheckpointError, match=r"step_0000005: .* rate 0\.0005, and the trials choose 0\.0017 now.*move"
    ):
        adopt_checkpoints(trial, folder)
    assert _steps(folder) == ["step_0000005", "step_0000009"]
    for name in _steps(folder):
        (folder / name).rename(tmp_path / name)
    adopt_checkpoints(trial, folder)
    assert _steps(folder) == ["step_0000003", "step_0000007"]


def test_published_steps_are_not_copied_when_their_training_is_begun_again(trial: Path, tmp_path: Path) -> None:
    folder = begin_artifact(tmp_path, "slm-tuned", "torch", digest="d")
    adopt_checkpoints(trial, folder)
    begin_artifact(tmp_path, "slm-tuned", "torch", digest="d")
    model = "model-00000.safetensors"
    assert os.path.samefile(step_folder(folder, 7) / model, step_folder(trial, 7) / model)


def test_a_damaged_trial_is_named(trial: Path, tmp_path: Path) -> None:
    (step_folder(trial, 3) / "state.json").unlink()
    with pytest.raises(
        ArtifactError, match=r"step_0000003/state.json: missing.*; remove .*/trial to have that training"
    ):
        adopt_checkpoints(trial, tmp_path / "model")
    for name in _steps(trial):
        shutil.rmtree(trial / name)
    with pytest.raises(ArtifactError, match=r"/trial: no checkpoints found; remove that folder"):
        adopt_checkpoints(trial, tmp_path / "model")
