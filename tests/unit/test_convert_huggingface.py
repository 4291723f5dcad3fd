"""Conversion is believed when Transformers, on random weights, gives the logits of Megatron-Core's model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_specialm.base.artifacts import Cost, Marker, begin_artifact, finish_artifact
from megatron_specialm.base.environment import ALONE, World
from megatron_specialm.base.errors import ArtifactError, CheckpointError, ConfigError
from megatron_specialm.base.files import verify_folder
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import declare_final
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.schema import ExportStage, Pipeline
from megatron_specialm.convert.huggingface import (
    huggingface_config,
    largest_logit_difference,
    to_huggingface,
)
from megatron_specialm.convert.huggingface_folder import open_folder
from megatron_specialm.data.store import SPLITS, StoreWriter, describe_store
from megatron_specialm.data.tokenizer import Tokenizer
from megatron_specialm.data.tokenizer_making import train_sentencepiece
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.weights import weight_specs
from megatron_specialm.stages import export
from tests.contexts import make_context

VOCABULARY, CONTEXT = 100, 16
Weights = dict[str, torch.Tensor]

# No setting has its default value, so that one that is lost shows in the logits.
NEOX = ModelConfig(layers=2, hidden_size=32, ffn_hidden_size=48, attention_heads=4, rotary_base=500, norm_epsilon=1e-2)
SHAPES = {
    "neox": NEOX,
    "neox, untied": NEOX.model_copy(update={"tie_embeddings": False}),
    "llama": NEOX.model_copy(update={"family": "llama"}),
    "llama, grouped": NEOX.model_copy(update={"family": "llama", "query_groups": 2}),
    "llama, one group, untied": NEOX.model_copy(update={"family": "llama", "query_groups": 1, "tie_embeddings": False}),
}
LLAMA = SHAPES["llama, grouped"]
EXPERTS = {
    "top-1": MixtureOfExperts(experts=4, top_k=1),
    "top-2, every second layer, shared expert": MixtureOfExperts(
        experts=4, every=2, ffn_hidden_size=24, shared_expert=40, capacity_factor=1.0, aux_loss=0.02
    ),
    "top-3 of 6, untied": MixtureOfExperts(experts=[6, 6], top_k=3, z_loss=0.1),
}
SHAPES |= {
    f"experts, {name}": LLAMA.model_copy(update={"moe": moe, "tie_embeddings": "untied" not in name})
    for name, moe in EXPERTS.items()
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def _random_weights(shape: ModelConfig, vocabulary_size: int = VOCABULARY) -> Weights:
    """Weights, biases and norms all random and large: nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(0)
    specs = weight_specs(shape, vocabulary_size=vocabulary_size)
    return {name: torch.randn(spec.shape, generator=generator) * 0.3 for name, spec in specs.items()}


@torch.no_grad()
def _logits(shape: ModelConfig, weights: Weights, tokens_BT: np.ndarray) -> torch.Tensor:
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT).train(False)
    model.load(weights)
    return model.logits(torch.from_numpy(tokens_BT))


def _write(folder: Path, shape: ModelConfig, weights: Weights) -> Path:
    config = huggingface_config(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, eod=1)
    config.save_pretrained(folder)
    save_file(to_huggingface(weights, shape), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _read(folder: Path) -> Weights:
    return {name: tensor[()] for name, tensor in open_folder(folder).weights.items()}


@every_shape
@pytest.mark.usefixtures("alone")
def test_transformers_gives_megatrons_logits(shape: ModelConfig, tmp_path: Path) -> None:
    weights = _random_weights(shape)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, CONTEXT))
    ours = _logits(shape, weights, tokens)
    folder = _write(tmp_path, shape, weights)
    assert largest_logit_difference(folder, tokens, ours) < 1e-4 < ours.std()
    assert largest_logit_difference(folder, tokens, ours + 1) == pytest.approx(1, abs=1e-3)
    ours[0, 0, 0] = math.nan
    assert math.isnan(largest_logit_difference(folder, tokens, ours))


@every_shape
@pytest.mark.usefixtures("alone")
def test_there_and_back_are_the_same_bits(shape: ModelConfig, tmp_path: Path) -> None:
    weights = _random_weights(shape)
    back = _read(_write(tmp_path, shape, weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())


@every_shape
@pytest.mark.usefixtures("alone")
def test_what_transformers_saves_is_read_back(shape: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = _random_weights(shape)
    AutoModelForCausalLM.from_pretrained(_write(tmp_path, shape, weights)).save_pretrained(tmp_path / "again")
    back = _read(tmp_path / "again")
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())


def test_a_group_packs_its_query_heads_then_key_then_value() -> None:
    """The module's worked example, with one number for each block of D = 8 rows."""
    shape = SHAPES["llama, grouped"].model_copy(update={"layers": 1})
    packed = torch.arange(8.0).repeat_interleave(8)[:, None].expand(64, 32)
    theirs = to_huggingface({**_one_layer(shape), "decoder.layers.0.self_attention.linear_qkv.weight": packed}, shape)
    blocks = {part: theirs[f"model.layers.0.self_attn.{part}_proj.weight"][::8, 0].tolist() for part in ("q", "k", "v")}
    assert blocks == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}


def _one_layer(shape: ModelConfig) -> Weights:
    """Canonical weights of a one-layer Llama, written out by hand: zeros."""
    layer = "decoder.layers.0"
    sizes = {
        "embedding.word_embeddings.weight": (VOCABULARY, 32),
        f"{layer}.input_layernorm.weight": (32,),
        f"{layer}.self_attention.linear_qkv.weight": (64, 32),
        f"{layer}.self_attention.linear_proj.weight": (32, 32),
        f"{layer}.pre_mlp_layernorm.weight": (32,),
        f"{layer}.mlp.linear_fc1.weight": (2 * shape.ffn_hidden_size, 32),
        f"{layer}.mlp.linear_fc2.weight": (32, shape.ffn_hidden_size),
        "decoder.final_layernorm.weight": (32,),
    }
    return {name: torch.zeros(size) for name, size in sizes.items()}


@pytest.mark.parametrize("shape", [shape for shape in SHAPES.values() if shape.moe], ids=EXPERTS.keys())
def test_transformers_reads_every_weight_of_experts_and_draws_none(shape: ModelConfig, tmp_path: Path) -> None:
    """Its report of loading is empty: what is missing from a file it would draw at random, and only say so."""
    _, report = AutoModelForCausalLM.from_pretrained(
        _write(tmp_path, shape, _random_weights(shape)), output_loading_info=True
    )
    assert not any(report.values()), report


def test_each_expert_has_its_own_part_under_its_own_name() -> None:
    shape = SHAPES["experts, top-1"]
    weights = _random_weights(shape)
    theirs = to_huggingface(weights, shape)
    experts = "decoder.layers.1.mlp.experts"
    gate_EFH, up_EFH = weights[f"{experts}.linear_fc1.weight"].chunk(2, dim=1)
    for expert in range(4):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        assert torch.equal(theirs[f"{prefix}.gate_proj.weight"], gate_EFH[expert])
        assert torch.equal(theirs[f"{prefix}.up_proj.weight"], up_EFH[expert])
        assert torch.equal(theirs[f"{prefix}.down_proj.weight"], weights[f"{experts}.linear_fc2.weight"][expert])


def test_an_expert_too_few_or_too_many_is_refused_and_a_bias_that_is_not_zero_is_read(tmp_path: Path) -> None:
    shape = SHAPES["experts, top-1"]
    weights = _random_weights(shape)
    experts = "decoder.layers.0.mlp.experts.linear_fc2.weight"
    with pytest.raises(CheckpointError, match=rf"{experts}: its shape does not fit .* or \[4\] experts"):
        to_huggingface({**weights, experts: weights[experts][:3]}, shape)
    folder = _write(tmp_path, shape, weights)
    theirs = to_huggingface(weights, shape)
    second, fifth = (f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in (1, 4))
    bias = "model.layers.1.self_attn.k_proj.bias"

    def change(**tensors: torch.Tensor | None) -> None:
        changed = {name: tensor for name, tensor in {**theirs, **tensors}.items() if tensor is not None}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    change(**{second: None})
    with pytest.raises(CheckpointError, match=f"{second} is missing"):
        open_folder(folder)
    change(**{fifth: theirs[second].clone()})
    with pytest.raises(CheckpointError, match=f"{fifth} has no place"):
        open_folder(folder)
    change(**{bias: theirs[bias] + 1})
    assert open_folder(folder).model.shape.qkv_bias and not shape.qkv_bias


def test_a_weight_too_few_or_too_many_is_named() -> None:
    shape = SHAPES["llama, grouped"].model_copy(update={"layers": 1})
    ours = _one_layer(shape)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        to_huggingface({key: value for key, value in ours.items() if key != name}, shape)
    with pytest.raises(CheckpointError, match=r"extra\.weight has no place"):
        to_huggingface({**ours, "extra.weight": torch.zeros(1)}, shape)


def test_weights_of_other_heads_are_named() -> None:
    shape = SHAPES["llama, grouped"].model_copy(update={"layers": 1})
    ours = _one_layer(shape)
    other = shape.model_copy(update={"query_groups": 4})
    with pytest.raises(CheckpointError, match=r"linear_qkv.weight: its shape does not fit 4 heads in 4 groups"):
        to_huggingface(ours, other)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (SHAPES["neox"], {"rotary_pct": 1.0, "rotary_emb_base": 500.0, "use_parallel_residual": False}),
        (SHAPES["llama, grouped"], {"rope_theta": 500.0, "num_key_value_heads": 2, "rms_norm_eps": 1e-2}),
        (
            SHAPES["experts, top-2, every second layer, shared expert"],
            {
                "rope_theta": 500.0,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-2,
                "decoder_sparse_step": 2,
                "norm_topk_prob": True,
                "num_experts_per_tok": 2,
                "num_experts": 4,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 40,
                "router_aux_loss_coef": 0.02,
            },
        ),
    ],
)
def test_config_json_speaks_to_transformers_4_and_5(shape: ModelConfig, expected: dict, tmp_path: Path) -> None:
    huggingface_config(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, eod=1).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in expected} == expected
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"family": "neox", "query_groups": None}, "LayerNorm, GELU and biases: set family: llama"),
        (
            {"moe": MixtureOfExperts(experts=4, residual=True)},
            "mixed with the experts by a softmax: use moe.shared_expert",
        ),
        ({"moe": MixtureOfExperts(experts=[4, 8])}, r"moe.experts is \[4, 8\]: give one number"),
        (
            {"moe": MixtureOfExperts(experts=4, bias_update_rate=0.01, aux_loss=0)},
            "0.01 they are sigmoids: use moe.aux_loss",
        ),
    ],
    ids=["neox", "residual", "pyramid", "sigmoid"],
)
def test_what_no_architecture_computes_is_refused_before_anything_trains(
    changed: dict, reason: str, pipeline: Pipeline
) -> None:
    shape = LLAMA.model_copy(update={"moe": MixtureOfExperts(experts=4), **changed})
    stages = {**pipeline.stages, "nopt": pipeline.stages["nopt"].model_copy(update={"model": shape})}
    unfit = pipeline.model_copy(update={"stages": stages})
    where = r"Or leave it out: its canonical weights are safetensors in .*/nopt/KEY/step_N"
    with pytest.raises(ConfigError, match=f"stages.export.models: 'nopt' cannot be exported: .*{reason}.*{where}"):
        build_graph(unfit)
    assert build_graph(unfit.model_copy(update={"stages": {n: s for n, s in stages.items() if n != "export"}}))


# --- the stage --------------------------------------------------------------------------------------------------------

TEXT = [f"Once upon a time there was a model, number {number}, and it was small.\n" for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(TEXT, folder, vocabulary_size=300, algorithm="bpe", sample_characters=100_000)
    return folder


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    """One model, trained on the domain alone, and its export."""
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    train = {"kind": "train", "tokens": "tokens", "data": "domain", "steps": 2, "global_batch_size": 8}
    return Pipeline.model_validate(
        {
            "name": "demo",
            "root": str(tmp_path),
            "text": {"generic": files, "domains": {"tales": files}},
            "stages": {
                "tokenizer": {"kind": "tokenizer"},
                "tokens": {"kind": "tokenize", "tokenizer": "tokenizer", "context_length": CONTEXT},
                "nopt": {**train, "model": SHAPES["llama, grouped"], "schedule": {"warmup_steps": 0}},
                "export": {"kind": "export", "tokens": "tokens", "models": ["nopt"]},
            },
        }
    )


def _make_inputs(root: Path, tokenizer_folder: Path, *, spoil: bool = False) -> None:
    """What the stages before an export leave."""
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "generic").symlink_to(tokenizer_folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    sizes = {"context_length": CONTEXT, "vocabulary_size": tokenizer.vocabulary_size}
    tokens = begin_artifact(root, "tokens", "tales", digest="t")
    splits = {}
    for split in SPLITS:
        writer = StoreWriter(tokens, split, **sizes)
        for ids in tokenizer.encode(TEXT):
            writer.add_document(ids)
        splits[split] = writer.finish()
    describe_store(tokens, splits=splits, tokenizer=tokenizer.fingerprint, eod=tokenizer.eod, **sizes)

    shape = SHAPES["llama, grouped"]
    weights = _random_weights(shape, tokenizer.vocabulary_size)
    if spoil:
        weights["decoder.final_layernorm.weight"][0] = math.nan
    state = {"model": shape.model_dump(mode="json"), "tokenizer": tokenizer.fingerprint, **sizes}
    trained = begin_artifact(root, "nopt", "tales", digest="n")
    save_checkpoint(trained, step=2, weights=weights, optimizer_state={}, state=state)
    declare_final(trained, step=2)
    cost = Cost(256, 10**9, 1.0, 1.0, "cpu", 1)
    finish_artifact(root, "nopt", "tales", Marker("n", cost, {"steps": 2, "validation_loss": 5.0}, {}))


def _context(pipeline: Pipeline, world: World = ALONE) -> Context:
    task = build_graph(pipeline)[TaskId("export", "nopt.tales")]
    root = Path(pipeline.root)
    return make_context(pipeline, task, root, begin_artifact(root, *task.id, digest="e"), world)


def _export(context: Context):
    stage = context.pipeline.stages["export"]
    assert isinstance(stage, ExportStage)
    return export.run(stage, context)


@pytest.fixture
def inputs(pipeline: Pipeline, tokenizer: Path, request: pytest.FixtureRequest) -> None:
    from megatron_specialm.engine.process_groups import process_group

    with process_group(ALONE):
        _make_inputs(Path(pipeline.root), tokenizer, spoil=getattr(request, "param", False))


@pytest.mark.usefixtures("inputs")
def test_an_export_is_whole_and_its_cards_example_runs(pipeline: Pipeline) -> None:
    # Under several ranks the first one exports by itself: it must not wait for a second that never comes.
    context = _context(pipeline, World(0, 2, 0, "tcp://127.0.0.1:1", "torchrun"))
    report = _export(context)
    folder = context.folder / "model"
    assert report.values["logit_difference"] < 1e-4
    verify_folder(folder)
    assert (
        sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
        == report.values["parameters"]
    )

    card = (folder / "README.md").read_text()
    example = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", example], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("</s>Once")
    _check_batches(folder)


def _check_batches(folder: Path) -> None:
    """What a user does next: fill a batch, cut what is too long, generate."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = {(settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) for settings in
           (tokenizer, model.config, model.generation_config)}  # fmt: skip
    assert ids == {(tokenizer.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)}
    batch = tokenizer(["Once", "Once upon a time"], padding=True, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=3, min_new_tokens=3)
    assert written.shape == (2, batch.input_ids.shape[1] + 3)
    assert batch.attention_mask[0, 0] == 0 and batch.attention_mask[:, -1].all()
    assert len(tokenizer("Once " * 100, truncation=True).input_ids) == CONTEXT


@pytest.mark.parametrize("inputs", [True], indirect=True, ids=["weights with a NaN"])
@pytest.mark.usefixtures("inputs")
def test_logits_that_do_not_agree_leave_nothing(pipeline: Pipeline) -> None:
    context = _context(pipeline)
    with pytest.raises(ArtifactError, match=r"not exported: .* differ from ours by up to nan, more than the tolerance"):
        _export(context)
    assert [path.name for path in context.folder.iterdir()] == ["task.json"]
