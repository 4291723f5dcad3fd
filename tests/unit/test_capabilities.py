"""What is refused before anything starts: every condition of the table, each with its numbers and the nearest way out."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from megatron_specialm.base.accelerator import MIB, Accelerator, parse_gpus
from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import ConfigError
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import DeepSpeedConfig, ParallelConfig, split_layers
from megatron_specialm.config.precision import Fp8Config, megatron_settings
from megatron_specialm.estimate import machine_needs
from megatron_specialm.estimate.capabilities import TABLE, lacking, refuse
from megatron_specialm.estimate.packing_capabilities import best_packing
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.graph.build import build_graph
from megatron_specialm.report.estimates import capabilities_table
from megatron_specialm.run.inline import fit_to_world

MODEL = ModelConfig(layers=6, hidden_size=96, ffn_hidden_size=384, attention_heads=6)
LORA = MODEL.model_copy(update={"lora": LowRank(rank=2)})
PROJECTED = MODEL.model_copy(update={"projection": Projection(experts=2, capacity=2, code_size=2)})
PLAIN = Setup(
    MODEL, ParallelConfig(), "fp32", vocabulary_size=1000, context_length=64, global_batch_size=32, micro_batch_size=4
)
NO_GPU = Accelerator("", None, None, gpus=0, memory_bytes=0)
H100 = Accelerator("NVIDIA H100", (9, 0), "2.10.0+cu12", gpus=1, memory_bytes=80 * 2**30)


def _layout(**parallel) -> Setup:
    return replace(PLAIN, parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("setup", "words", "way_out"),
    [
        (replace(PLAIN, global_batch_size=30), "global_batch_size 30 must be a multiple of micro_batch_size 4 x "
         "data_parallel 1 = 4", "nearest global_batch_size that does is 28"),
        (_layout(tensor_parallel=4), "tensor_parallel 4 must divide the model's attention_heads 6", "is 3"),
        (replace(_layout(tensor_parallel=3, sequence_parallel=True), context_length=64),
         "tensor_parallel 3 must divide context_length 64", "is 2"),
        (_layout(pipeline_parallel=8), "pipeline_parallel 8 x virtual_pipeline 1 = 8 is more than the model's 6 layers",
         "is 6"),
        (_layout(pipeline_parallel=2, virtual_pipeline=4), "= 8 is more than the model's 6 layers", "is 1"),
        (replace(_layout(pipeline_parallel=4), micro_batch_size=16), "= 2 micro-batches are fewer than "
         "pipeline_parallel 4", "nearest micro_batch_size that does is 8"),
        (replace(_layout(pipeline_parallel=2, virtual_pipeline=2), global_batch_size=20),
         "5 micro-batches must be a multiple of pipeline_parallel 2", "is 16"),
        (_layout(context_parallel=5), "context_length 64 must be a multiple of twice that", "is 4"),
    ],
)  # fmt: skip
def test_a_no_has_its_numbers_and_the_nearest_yes(setup: Setup, words: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        refuse("slm", setup)
    assert str(refusal.value).startswith("stages.slm: ")
    assert words in str(refusal.value) and str(refusal.value).endswith(way_out)


def _deepspeed(**parallel) -> Setup:
    return replace(PLAIN, parallel=DeepSpeedConfig(engine="deepspeed", **parallel))


@pytest.mark.parametrize(
    ("setup", "words", "way_out"),
    [
        (_deepspeed(pipeline_parallel=2), "engine deepspeed does not offer pipeline parallel: its pipeline takes another kind",
         "set parallel.pipeline_parallel: 1, or parallel.engine: megatron"),
        (_deepspeed(context_parallel=2), "engine deepspeed does not offer context parallel",
         "set parallel.context_parallel: 1, or parallel.engine: megatron"),
        (_deepspeed(tensor_parallel=2, sequence_parallel=True), "engine deepspeed does not offer sequence parallel",
         "set parallel.sequence_parallel: false, or parallel.engine: megatron"),
        (replace(_deepspeed(), precision="fp8", fp8=Fp8Config()), "engine deepspeed does not offer fp8",
         "set precision: bf16, or parallel.engine: megatron"),
        (replace(_deepspeed(zero_stage=0), precision="bf16"), "bf16 with zero_stage 0",
         "nearest parallel.zero_stage that does is 1"),
        (_deepspeed(zero_stage=0, offload_optimizer=True), "offload_optimizer with zero_stage 0",
         "nearest parallel.zero_stage that does is 1"),
        (replace(_deepspeed(zero_stage=3), model=LORA), "LoRA with zero_stage 3",
         "nearest parallel.zero_stage that does is 1"),
        (replace(_deepspeed(zero_stage=3), model=PROJECTED, windows_per_expert=4),
         "projected network with zero_stage 3", "nearest parallel.zero_stage that does is 2"),
        (replace(_deepspeed(), precision="bf16", model=LORA),
         "bf16 under engine deepspeed rounds the weights", "set precision: fp32, or parallel.engine: megatron"),
        (_deepspeed(tensor_parallel=4), "tensor_parallel 4 must divide the model's attention_heads 6", "is 3"),
    ],
)  # fmt: skip
def test_deepspeed_refuses_with_the_reason_and_the_nearest_setting(setup: Setup, words: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        refuse("slm", setup)
    assert words in str(refusal.value) and str(refusal.value).endswith(way_out)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_of_zero_is_accepted(stage: int) -> None:
    refuse("slm", _deepspeed(zero_stage=stage, tensor_parallel=3, data_parallel=2, recompute="full"))


@pytest.mark.parametrize(("found", "words"), [(None, "it is not installed"), ("0.19.5", "version 0.19.5 is installed")])
def test_deepspeed_missing_or_too_old(monkeypatch: pytest.MonkeyPatch, found: str | None, words: str) -> None:
    assert lacking(_deepspeed(), NO_GPU) is None
    monkeypatch.setattr(machine_needs, "installed_version", lambda _: found)
    refusal = lacking(_deepspeed(), NO_GPU)
    assert refusal is not None and refusal.reason == f"engine deepspeed needs deepspeed >=0.19.6, and {words}"
    assert refusal.remedy == "pip install 'deepspeed>=0.19.6', or set parallel.engine: megatron"
    assert lacking(PLAIN, NO_GPU) is None


def _moe(**moe) -> ModelConfig:
    return MODEL.model_copy(update={"moe": MixtureOfExperts(experts=4, **moe)})


@pytest.mark.parametrize(
    ("setup", "words", "way_out"),
    [
        (replace(PLAIN, packing="packed", model=_moe()),
         "packing packed puts other windows into a micro-batch together, and moe.aux_loss 0.01 and moe.capacity_factor None",
         "set packing: none"),
        (replace(PLAIN, packing="sorted", model=_moe(aux_loss=0.0, capacity_factor=1.5)), "moe.capacity_factor 1.5",
         "set packing: none"),
        (replace(_layout(context_parallel=2), packing="packed"), "packing packed with context_parallel 2",
         "set packing: none (and of a projected network windows_per_expert to a multiple of micro_batch_size)"),
        (replace(_layout(pipeline_parallel=2), packing="sorted"),
         "packing sorted makes micro-batches of different lengths, and with pipeline_parallel 2", "set packing: packed"),
    ],
)  # fmt: skip
def test_a_packing_that_model_or_layout_cannot_have(setup: Setup, words: str, way_out: str) -> None:
    test_a_no_has_its_numbers_and_the_nearest_yes(setup, words, way_out)
    refuse("slm", replace(setup, packing=way_out.removeprefix("set packing: ")))


@pytest.mark.parametrize(
    ("setup", "best"),
    [
        (PLAIN, "packed"),
        (_layout(pipeline_parallel=2), "packed"),
        (replace(PLAIN, model=_moe(bias_update_rate=0.01)), "packed"),
        (replace(PLAIN, model=_moe(route="cluster")), "packed"),
        (replace(PLAIN, model=_moe()), "none"),
        (_layout(context_parallel=2), "none"),
    ],
)
def test_the_default_packing_is_the_best_that_is_allowed(setup: Setup, best: str) -> None:
    assert best_packing(setup) == best
    refuse("slm", replace(setup, packing=best))


def test_settings_of_another_engine() -> None:
    with pytest.raises(
        ValidationError, match="distributed_optimizer is a setting of engine megatron: set zero_stage: 1"
    ):
        DeepSpeedConfig(engine="deepspeed", distributed_optimizer=True)
    with pytest.raises(ValidationError, match="zero_stage is a setting of engine deepspeed"):
        ParallelConfig(zero_stage=2)
    settings = ParallelConfig(data_parallel=2, distributed_optimizer=True).for_engine("deepspeed")
    assert DeepSpeedConfig(**settings) == DeepSpeedConfig(engine="deepspeed", data_parallel=2)
    with pytest.raises(ConfigError, match="engine jax is unknown: it is one of megatron, deepspeed"):
        ParallelConfig().for_engine("jax")


def test_the_way_out_is_one() -> None:
    """What a refusal proposes is then accepted."""
    refuse("slm", replace(PLAIN, global_batch_size=28))
    refuse("slm", _layout(tensor_parallel=3))
    refuse("slm", replace(_layout(pipeline_parallel=4), micro_batch_size=8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sequence_parallel": True}, "raise tensor_parallel to 2"),
        ({"virtual_pipeline": 3}, "virtual_pipeline 3 goes with pipeline_parallel above 1"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"tensor_paralel": 2}, "tensor_paralel"),
    ],
)
def test_a_layout_checks_itself(settings: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ParallelConfig(**settings)


def test_layers_that_stages_do_not_divide() -> None:
    for layers, chunks in ((5, 2), (7, 3), (4, 4), (13, 8)):
        model = MODEL.model_copy(update={"layers": layers})
        counts = split_layers(model, 1000, chunks)
        assert sum(counts) == layers and min(counts) >= 1 and len(counts) == chunks
        assert counts[-1] == min(counts), "the last has the output layer beside"
    with pytest.raises(ValueError, match="6 layers cannot be split into 7"):
        split_layers(MODEL, 1000, 7)


def _fp8(**settings) -> Setup:
    model = MODEL.model_copy(update={"hidden_size": 192, "ffn_hidden_size": 768})
    return replace(PLAIN, model=model, precision="fp8", fp8=Fp8Config(**settings))


def test_fp8_needs_its_hardware() -> None:
    assert lacking(PLAIN, NO_GPU) is None
    assert lacking(_fp8(), H100) is None
    assert lacking(_fp8(recipe="blockwise"), H100) is None
    for setup, machine, words in (
        (_fp8(), NO_GPU, "8.9 or more, and this machine has no GPU: use `precision: bf16`"),
        (_fp8(), replace(H100, capability=(8, 0)), "1 x NVIDIA H100 (compute capability 8.0)"),
        (_fp8(recipe="blockwise"), replace(H100, capability=(8, 9)), "recipe: tensorwise, or use `precision: bf16`"),
        (_fp8(), replace(H100, transformer_engine=None), "it is not installed: pip install"),
        (_fp8(), replace(H100, transformer_engine="1.13"), "version 1.13 is installed"),
        (_layout(context_parallel=2), NO_GPU, "context_parallel 2 needs GPUs with Transformer Engine"),
        (_layout(context_parallel=2), H100, "Transformer Engine's attention, which takes no fp32: set precision: bf16"),
    ):
        reason = lacking(setup, machine)
        assert reason is not None and words in str(reason)


def test_fp8_needs_sizes_that_fit() -> None:
    refuse("slm", _fp8())
    for setup, words in (
        (replace(_fp8(), model=MODEL.model_copy(update={"hidden_size": 72})), "hidden_size 72 / 1 processes is not"),
        (replace(_fp8(), micro_batch_size=1, context_length=24), "micro_batch_size x context_length 24"),
        (_fp8(bf16_first_layers=7), "at most the layers of a pipeline stage, 6 / 1"),
        (_fp8(bf16_first_layers=3, bf16_last_layers=3), "leave none of the 6 layers"),
    ):
        with pytest.raises(ConfigError, match="fp8") as refusal:
            refuse("slm", setup)
        assert words in str(refusal.value)
    with pytest.raises(ValidationError, match="recipe delayed goes with all layers and linears"):
        Fp8Config(recipe="delayed", linears=("fc1",))


def test_precision_in_megatron_cores_words() -> None:
    assert megatron_settings("fp32", None) == {"bf16": False}
    settings = megatron_settings("fp8", Fp8Config(format="e4m3", recipe="blockwise", bf16_last_layers=1))
    assert settings["bf16"] and settings["fp8"] == "e4m3" and settings["fp8_recipe"] == "blockwise"
    assert settings["first_last_layers_bf16"] and settings["num_layers_at_start_in_bf16"] == 0


def test_fp8_settings_go_with_fp8() -> None:
    config = configs_folder() / "pipelines" / "smoke.yaml"
    with pytest.raises(ConfigError, match="`fp8` goes with `precision: fp8`"):
        load_pipeline(config, ["stages.slm.fp8.recipe=delayed"])
    stage = load_pipeline(config, ["stages.slm.precision=fp8"]).stages["slm"]
    assert stage.fp8 == Fp8Config()  # type: ignore[union-attr]


def test_what_the_driver_says() -> None:
    assert parse_gpus("NVIDIA H200, 9.0, 143771\n") == [("NVIDIA H200", (9, 0), 143771 * MIB)]
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == []
    assert parse_gpus("") == []


def test_the_table_for_a_reader() -> None:
    assert [line[2] for line in capabilities_table().lines] == [capability.feature for capability in TABLE]


def test_ranks_that_the_layout_does_not_divide() -> None:
    config = configs_folder() / "pipelines" / "smoke.yaml"
    pipeline = load_pipeline(config, ["stages.slm.parallel.tensor_parallel=2"])
    with pytest.raises(ConfigError) as refusal:
        fit_to_world(pipeline, World(0, 5, 0, "env://", "torchrun"), stages=pipeline.stages)
    assert "stages.slm.parallel: 5 ranks (torchrun)" in str(refusal.value)
    assert str(refusal.value).endswith("start 4 ranks, or change the layout")
    fitted = fit_to_world(pipeline, World(0, 4, 0, "env://", "torchrun"), stages=["tokens", "slm"])
    assert fitted.stages["slm"].parallel.data_parallel == 2  # type: ignore[union-attr]


def test_weights_of_another_tokenizer() -> None:
    """Of the same size, so that nothing else would notice."""
    config = configs_folder() / "pipelines" / "smoke.yaml"
    other = ["stages.words.kind=tokenizer", "stages.other.kind=tokenize", "stages.other.tokenizer=words"]
    pipeline = load_pipeline(config, [*other, "stages.other.context_length=64", "stages.slm-tuned.tokens=other"])
    with pytest.raises(ConfigError, match="they are of tokenizer `words`, and the weights of `slm` of tokenizer"):
        build_graph(pipeline)


def test_the_trials_of_a_selection_are_checked() -> None:
    quickstart = configs_folder() / "pipelines" / "quickstart.yaml"
    trial = "stages.slm-mix-chosen.trial={steps: 20, global_batch_size: 8, packing: %s}"
    overrides = ["stages.slm-mix.model=nano-moe", "stages.slm-mix-chosen.by=finetuned"]
    build_graph(load_pipeline(quickstart, [*overrides, trial % "none"]))
    with pytest.raises(ConfigError, match=r"stages\.slm-mix-chosen\.trial: packing packed .*; set packing: none"):
        build_graph(load_pipeline(quickstart, [*overrides, trial % "packed"]))
