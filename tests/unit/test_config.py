from pathlib import Path

import pytest

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.load import configs_folder, dump_pipeline, load_pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.estimate.parameters import count_parameters
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.lineage import is_finetuned, method_of
from megatron_specialm.graph.tasks import TaskId

CONFIGS = sorted((configs_folder() / "pipelines").glob("*.yaml"))
SMOKE = configs_folder() / "pipelines" / "smoke.yaml"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_shipped_config_loads_and_plans(config: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(config)
    graph = build_graph(pipeline)
    assert {name.stage for name in graph} == set(pipeline.stages)
    done: set[TaskId] = set()
    for name, task in graph.items():
        assert done.issuperset(task.inputs), f"{name} stands before an input"
        done.add(name)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_pipeline(pipeline))
    assert load_pipeline(resolved) == pipeline


@pytest.mark.parametrize("preset", sorted((configs_folder() / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_preset_is_a_shape(preset: Path) -> None:
    stage = load_pipeline(SMOKE, [f"stages.slm.model={preset.stem}"]).stages["slm"]
    assert isinstance(stage, TrainStage) and stage.model is not None and stage.model.name == preset.stem


def test_a_config_for_ones_own_text_is_short() -> None:
    lines = (configs_folder() / "pipelines" / "your-domain.yaml").read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.lstrip().startswith("#")]) < 32


def test_the_papers_sizes() -> None:
    """Table 1 says 126M and 771M; with a vocabulary of 32,000 and tied embeddings its shapes have 120.9M and 756.5M."""
    for preset, parameters in (("slm-126m", 120_943_616), ("llm-771m", 756_481_792)):
        stage = load_pipeline(SMOKE, [f"stages.slm.model={preset}"]).stages["slm"]
        assert isinstance(stage, TrainStage) and stage.model is not None
        assert count_parameters(stage.model, 32_000) == parameters


def test_methods_and_states_follow_from_the_graph() -> None:
    pipeline = load_pipeline(SMOKE)
    assert [method_of(pipeline, name) for name in ("slm", "slm-tuned", "slm-is-tuned")] == ["slm", "slm", "slm-is"]
    tuned = {"slm": False, "slm-is": False, "slm-tuned": True, "slm-nopt": True}
    assert {name: is_finetuned(pipeline, name) for name in tuned} == tuned


def test_overrides_are_read_as_yaml() -> None:
    pipeline = load_pipeline(SMOKE, ["seed=7", "stages.slm.optimizer.learning_rate=3.0e-4", "local.threads=2"])
    stage = pipeline.stages["slm"]
    assert isinstance(stage, TrainStage)
    assert (pipeline.seed, stage.optimizer.learning_rate, pipeline.local.threads) == (7, 3e-4, 2)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.slm.stepz=1", r"stages\.slm\.stepz: unknown key; did you mean 'steps'"),
        ("stages.slm.optimizer.learning_rat=1", r"optimizer\.learning_rat: unknown key; did you mean 'learning_rate'"),
        ("text.domains.torch.trian=x", r"text\.domains\.torch\.trian: unknown key; did you mean 'train'"),
        ("sed=1", "sed: unknown key; did you mean 'seed'"),
        ("seed=x", r"seed: .*integer.*'x'"),
        ("seed=-1", r"seed: .*got -1"),
        ("stages.slm.steps=0", r"stages\.slm\.steps: .*got 0"),
        ("stages.slm.model=tinny", r"no preset 'tinny'; did you mean 'tiny'"),
        ("stages.slm.model=null", "either `model`"),
        ("stages.slm.assignment=assignment", "`assignment` goes with `data: importance`"),
        (
            "stages.slm.global_batch_size=7",
            "global_batch_size 7 must be a multiple .* nearest global_batch_size that does is",
        ),
        ("stages.slm.schedule.warmup_steps=10000", "warmup_steps 10000 is more than steps"),
        ("stages.slm.kind=trian", "'trian' is not a stage kind; did you mean 'train'"),
        ("stages.smm.steps=5", r"stages\.smm: has no `kind`; did you mean 'slm'.*kinds: tokenizer"),
        ("stages.vectors.encoder.kind=bert", r"encoder"),
        ("stages.clusters.vectors=vectorz", r"stages\.clusters\.vectors: no stage 'vectorz'"),
        ("stages.clusters.vectors=tokens", "'tokens' is a stage of kind 'tokenize', not 'embed'"),
        ("defaults.trian={}", "defaults.trian: unknown; did you mean 'train'"),
        ("text.domains.generic={train: a, test: b}", "'generic' is taken"),
        ("steps", "write KEY=VALUE"),
        ("seed.x=1", "seed is a value, not a mapping"),
    ],
)
def test_mistakes_name_the_key_the_value_and_the_fix(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_graph(load_pipeline(SMOKE, [override]))


def test_an_override_removes_a_stage_or_a_domain() -> None:
    last = ["stages.export=null", "stages.perplexity=null", "stages.slm-soup-tuned=null", "text.domains.torch=null"]
    pipeline = load_pipeline(SMOKE, last)
    assert not {"export", "perplexity", "slm-soup-tuned"} & pipeline.stages.keys()
    assert list(pipeline.text.domains) == ["scipy", "sklearn"]
    with pytest.raises(ConfigError, match=r"the config has no stages\.slm-soup-tund.*slm-soup-tuned"):
        load_pipeline(SMOKE, ["stages.slm-soup-tund=null"])


def test_a_cycle_is_shown() -> None:
    pipeline = load_pipeline(SMOKE, ["stages.slm.init=slm-tuned", "stages.slm.model=null"])
    with pytest.raises(ConfigError, match="slm -> slm-tuned -> slm is a cycle"):
        build_graph(pipeline)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: [", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "'seed' is there twice"),
        ("- a\n", "must be a mapping"),
        ("extends: config.yaml\n", "extends itself"),
        ("extends: absent.yaml\n", r"absent\.yaml: no such file \(named by `extends` in .*config\.yaml"),
    ],
)
def test_files_that_are_no_configs(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_pipeline(tmp_path / "config.yaml")


def test_a_missing_config_suggests_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'smoke\.yaml'"):
        load_pipeline(SMOKE.with_name("smok.yaml"))
