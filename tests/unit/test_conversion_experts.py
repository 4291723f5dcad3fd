"""Mixtures of experts converted: what settings say, every pair of formats, and experts that are swapped, lost or there twice on
the way, which are named."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_specialm.base.errors import ArtifactError, CheckpointError
from megatron_specialm.base.files import write_json
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.config.architectures import read_config
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.convert import deepspeed_models, megatron_moe
from megatron_specialm.convert.deepspeed_folder import open_deepspeed
from megatron_specialm.convert.fingerprint import read_fingerprint
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.probe import Probe
from megatron_specialm.convert.run import convert, hash_moments, stream
from megatron_specialm.convert.source import Layout
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.weights import weight_specs
from tests.checkpoints import MIXTURES, VOCABULARY, assert_same_logits, random_model, save_random_model
from tests.unit.test_conversion_moments import save_training

Tensors = dict[str, torch.Tensor]
SHAPE = ModelConfig(family="llama", layers=4, hidden_size=32, ffn_hidden_size=48, attention_heads=4, query_groups=2)
# Settings that only our own models have, or that Transformers writes in another way.
OURS = {
    "top-1": MixtureOfExperts(experts=4, top_k=1, ffn_hidden_size=24),
    "top-2, another size": MixtureOfExperts(experts=4, ffn_hidden_size=24, capacity_factor=1.25, z_loss=0.01),
    "shared": MixtureOfExperts(experts=4, every=2, shared_expert=40),
    "biases": MixtureOfExperts(experts=4, top_k=3, bias_update_rate=0.01),
    "residual": MixtureOfExperts(experts=4, residual=True),
    "pyramid": MixtureOfExperts(experts=[2, 4], every=2),
}


def _save(folder: Path, shape: ModelConfig) -> Path:
    """A step of a training, with random weights."""
    generator = torch.Generator().manual_seed(0)
    specs = weight_specs(shape, vocabulary_size=VOCABULARY)
    weights = {name: torch.randn(spec.shape, generator=generator) * 0.3 for name, spec in specs.items()}
    state = {"model": shape.model_dump(mode="json"), "vocabulary_size": VOCABULARY, "context_length": 64}
    save_checkpoint(folder, step=3, weights=weights, optimizer_state={}, state={**state, "tokenizer": "t"})
    return folder / "step_0000003"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of Transformers. One has several files."""
    root = tmp_path_factory.mktemp("sources")
    sizes = {"mixtral": "60KB"}
    return {name: save_random_model(name, root / name, max_shard_size=sizes.get(name, "5GB")) for name in MIXTURES}


@pytest.mark.parametrize("family", ["llama", "neox"])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.usefixtures("alone")
@torch.no_grad()
def test_the_probe_computes_what_our_models_compute(name: str, family: str, tmp_path: Path) -> None:
    groups = 2 if family == "llama" else None
    shape = SHAPE.model_copy(update={"family": family, "query_groups": groups, "moe": OURS[name]})
    opened = open_source(_save(tmp_path, shape))
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=16).train(False)
    model.load(opened.weights)
    found = stream(opened)
    expected = model.logits(torch.tensor([found.tokens]))[0][:, found.places]
    assert_same_logits(torch.tensor(found.logits), expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("name", "theirs"), [("top-1", "Qwen2Moe"), ("top-2, another size", "Mixtral"), ("shared", "Qwen2Moe")]
)
def test_our_models_through_every_format(name: str, theirs: str, tmp_path: Path) -> None:
    """Zeros that Qwen2-MoE needs are recognized and left out again; settings of training may be lost."""
    shape = SHAPE.model_copy(update={"moe": OURS[name]})
    expected = stream(open_source(_save(tmp_path, shape)))
    before = tmp_path / "step_0000003"
    for to in ("huggingface", "megatron", "canonical", "megatron-legacy", "huggingface"):
        after = tmp_path / f"{before.name}-{to}"
        layout = Layout(2, 2, 2) if "megatron" in to else Layout()
        assert convert(before, after, to=to, layout=layout).fingerprint == expected
        before = after
    model, report = AutoModelForCausalLM.from_pretrained(before, output_loading_info=True)
    assert type(model).__name__ == f"{theirs}ForCausalLM" and not any(report.values())


LAYOUTS = {
    "huggingface": [Layout()],
    "canonical": [Layout()],
    "megatron": [Layout(), Layout(2, 2, 2)],
    "megatron-legacy": [Layout(), Layout(1, 1, 2), Layout(2, 2, 2), Layout(1, 2, 4)],
    "deepspeed": [Layout(), *(Layout(1, 1, experts, zero_stage=1, data_parallel=2) for experts in (1, 2))],
}


@pytest.mark.slow
def test_every_pair_of_formats_in_every_layout(sources: dict[str, Path], tmp_path: Path) -> None:
    """Expert parallelism 1 and 2, with tensor, pipeline and data parallelism: weights and logits are equal bit by bit."""
    expected = stream(open_source(sources["qwen2-moe"]))
    made: dict[str, Path] = {}
    for to, layouts in LAYOUTS.items():
        made[to] = tmp_path / to
        convert(sources["qwen2-moe"], made[to], to=to, layout=layouts[-1])
    for (before, source), (to, layouts) in product(made.items(), LAYOUTS.items()):
        for number, layout in enumerate(layouts):
            folder = tmp_path / f"{before}-{to}-{number}"
            assert convert(source, folder, to=to, layout=layout).fingerprint == expected, (before, to, layout)


def test_experts_in_one_tensor_are_read(sources: dict[str, Path], tmp_path: Path) -> None:
    """As the modules of Transformers 5 hold them."""
    expected = stream(open_source(sources["mixtral"]))
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(sources["mixtral"] / "config.json", source)
    state = {name: tensor.contiguous() for name, tensor in random_model("mixtral").state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    save_file(state, source / "model.safetensors")
    assert stream(open_source(source)) == expected
    state["model.layers.1.mlp.experts.2.up_proj.weight"] = torch.zeros(48, 32)
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.2\.up_proj\.weight is there twice"):
        open_source(source)


# --- what a fingerprint and the tables catch ----------------------------------------------------------------------------

_EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"


def _swap_experts(tensors: Tensors) -> None:
    for part in ("w1", "w2", "w3"):
        one, other = _EXPERT.format(1, 0, part), _EXPERT.format(1, 3, part)
        tensors[one], tensors[other] = tensors[other], tensors[one]


def _swap_layers(tensors: Tensors) -> None:
    for part, expert in product(("w1", "w2", "w3"), range(4)):
        one, other = _EXPERT.format(0, expert, part), _EXPERT.format(2, expert, part)
        tensors[one], tensors[other] = tensors[other], tensors[one]


def _swap_gate_and_up(tensors: Tensors) -> None:
    one, other = _EXPERT.format(1, 2, "w1"), _EXPERT.format(1, 2, "w3")
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _copy_expert(tensors: Tensors) -> None:
    for part in ("w1", "w2", "w3"):
        tensors[_EXPERT.format(3, 1, part)] = tensors[_EXPERT.format(3, 2, part)].clone()


def _swap_router_rows(tensors: Tensors) -> None:
    name = "model.layers.2.block_sparse_moe.gate.weight"
    tensors[name] = tensors[name][[1, 0, 2, 3]]


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(name)].clear()


def _add(name: str, like: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[like].clone()})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_swap_experts, r"says: decoder\.layers\.1\.mlp\.experts\.linear_fc1\.weight, .*\.1\.mlp\.experts\.linear_fc2\."),
        (_swap_layers, r"layers\.0\.mlp\.experts\.linear_fc1\.weight \(has the content of decoder\.layers\.2\.mlp\.experts\."),
        (_swap_gate_and_up, r"says: decoder\.layers\.1\.mlp\.experts\.linear_fc1\.weight:"),
        (_copy_expert, r"says: decoder\.layers\.3\.mlp\.experts\.linear_fc1\.weight, .*\.3\.mlp\.experts\.linear_fc2\.weight:"),
        (_swap_router_rows, r"says: decoder\.layers\.2\.mlp\.router\.weight:"),
        (_drop(_EXPERT.format(1, 2, "w2")), r"layers\.1\.block_sparse_moe\.experts\.2\.w2\.weight is missing"),
        (_add(_EXPERT.format(1, 4, "w2"), _EXPERT.format(1, 0, "w2")), r"block_sparse_moe\.experts\.4\.w2\..* no place"),
        (_add("model.layers.1.mlp.experts.2.up_proj.weight", _EXPERT.format(1, 2, "w3")), r"2\.up_proj\.weight is there twice"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named(
    fault: Callable[[Tensors], None], message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    convert(sources["mixtral"], tmp_path / "theirs", to="huggingface")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    fault(tensors)
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "theirs", tmp_path / "ours", to="canonical")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_faults_in_deepspeeds_files_are_named(sources: dict[str, Path], tmp_path: Path) -> None:
    """Experts' files and the optimizer's partitions."""
    layout = Layout(expert_parallel=2, zero_stage=1, data_parallel=2)
    convert(sources["mixtral"], tmp_path / "theirs", to="deepspeed", layout=layout)
    step = tmp_path / "theirs" / "global_step0"
    files = [step / f"layer_1_expert_{expert}_mp_rank_00_model_states.pt" for expert in range(4)]
    assert len(list(step.glob("layer_*_expert_*"))) == 4 * 4 and all(file.is_file() for file in files)
    kept = [file.read_bytes() for file in files]
    files[2].unlink()
    with pytest.raises(CheckpointError, match=r"layer_1_expert_2_mp_rank_00_model_states\.pt: is missing"):
        open_source(tmp_path / "theirs")
    files[2].write_bytes(kept[1])
    with pytest.raises(CheckpointError, match=r"layer_1_expert_2_.*which is not of expert 2 or is there twice"):
        open_source(tmp_path / "theirs")
    files[2].write_bytes(kept[2])
    ranks = [step / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    contents = [rank.read_bytes() for rank in ranks]
    for rank, content in zip(ranks, reversed(contents), strict=True):  # experts 0 and 1 for 2 and 3
        rank.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"not what its fingerprint says: .*layers\.0\.mlp\.experts\.linear_fc1\.weight"
    ):
        stream(open_source(tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(expert_parallel=3, zero_stage=1, data_parallel=3), "expert parallelism 3 does not divide 4 ranks or experts"),
        (Layout(expert_parallel=2), "--expert-parallel is of a mixture of experts with --zero-stage 1"),
    ],
)  # fmt: skip
def test_a_layout_that_deepspeed_does_not_have(
    layout: Layout, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(sources["mixtral"], tmp_path / "target", to="deepspeed", layout=layout)
    assert not list(tmp_path.iterdir())


def test_moments_of_experts_go_along(tmp_path: Path) -> None:
    shape = SHAPE.model_copy(update={"moe": OURS["top-1"]})  # Qwen2-MoE, with zeros beside it
    source = save_training(tmp_path / "ours", shape)
    opened = open_source(source)
    assert opened.optimizer is not None
    layout = Layout(expert_parallel=2, zero_stage=1, data_parallel=4)
    convert(source, tmp_path / "deepspeed", to="deepspeed", layout=layout)
    convert(tmp_path / "deepspeed", tmp_path / "back", to="canonical")
    assert hash_moments(open_source(tmp_path / "back")) == hash_moments(opened)
    left = convert(source, tmp_path / "megatron", to="megatron").source
    assert left.optimizer is None and "an optimizer for experts" in left.dropped["optimizer state"]


def test_large_experts_are_in_several_parameter_groups(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed makes them of each rank's parameters."""
    monkeypatch.setattr(deepspeed_models, "GROUP_ELEMENTS", 20_000)
    layout = Layout(expert_parallel=2, zero_stage=1, data_parallel=2)
    expected = convert(sources["mixtral"], tmp_path / "theirs", to="deepspeed", layout=layout).fingerprint
    opened = open_deepspeed(tmp_path / "theirs")
    assert stream(open_source(tmp_path / "theirs")) == expected
    sizes = [sum(opened.tensors[name][()].numel() for name in group.names) // 2 for group in opened.groups[1:]]
    assert len(sizes) == 2 and max(sizes) <= 20_000 and sum(sizes) == 4 * 2 * 3 * 32 * 48


@pytest.mark.parametrize("form", ["megatron-legacy"])
def test_a_writer_that_swaps_experts_leaves_nothing(
    form: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = megatron_moe.part
    monkeypatch.setattr(megatron_moe, "part", lambda tensor, expert: part(tensor, expert ^ 1))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts\.linear_fc1\.weight, .*experts\.linear_fc2"):
        convert(sources["mixtral"], tmp_path / "target", to=form, layout=Layout(expert_parallel=2))
    assert not list(tmp_path.iterdir())


def test_an_expert_missing_or_twice_in_a_legacy_checkpoint(sources: dict[str, Path], tmp_path: Path) -> None:
    """Of two ranks' files, with two experts each."""
    folder = tmp_path / "theirs"
    convert(sources["mixtral"], folder, to="megatron-legacy", layout=Layout(expert_parallel=2))
    file = folder / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    kept = torch.load(file, weights_only=False)  # of our own making
    name = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
    less = {key: tensor for key, tensor in kept["model"].items() if key != name}
    torch.save({**kept, "model": less}, file)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.experts\.linear_fc1\.weight: expert 3 is missing.*has 4"
    ):
        open_source(folder)
    grouped = "decoder.layers.1.mlp.experts.linear_fc1.weight1"
    torch.save({**kept, "model": {**kept["model"], grouped: kept["model"][name]}}, file)
    with pytest.raises(CheckpointError, match="is there twice, under names of two kinds"):
        open_source(folder)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"mp_rank_00_001"):
        open_source(folder)


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2-moe", {"norm_topk_prob": False}, "num_experts_per_tok is 2.*softmax probabilities; here they are divided"),
        ("qwen3-moe", {"norm_topk_prob": True}, "num_experts_per_tok is 1.*divided by their sum; here"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096"),
        ("qwen2-moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\].*decoder_sparse_step"),
        ("mixtral", {"num_experts_per_tok": 5}, "top_k 5 is more than experts 4"),
        ("mixtral", {"num_local_experts": 5}, r"block_sparse_moe\.gate\.weight has shape \(4, 32\), .* makes it \(5, 32\)"),
        ("mixtral", {"intermediate_size": 40}, r"experts\.0\.w1\.weight has shape \(48, 32\), .* makes it \(40, 32\)"),
    ],
)  # fmt: skip
def test_a_config_that_no_router_of_ours_computes(
    name: str, changes: dict, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(sources[name], tmp_path / "source")
    settings = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", {**settings, **changes})
    with pytest.raises(CheckpointError, match=message):
        open_source(source)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(expert_parallel=3), "expert_parallel 3 does not divide the model's 4 experts"),
        (Layout(tensor_parallel=4), "tensor_parallel 4 does not divide the model's 2 query groups"),
    ],
)
@pytest.mark.parametrize("form", ["megatron", "megatron-legacy"])
def test_a_layout_that_does_not_divide_the_experts(
    form: str, layout: Layout, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(sources["mixtral"], tmp_path / "target", to=form, layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("residual", "huggingface", "a dense part mixed with the experts by a softmax"),
        ("residual", "megatron", "Megatron-Core has no moe.residual"),
        ("pyramid", "megatron", r"Megatron-Core has no moe.experts \[2, 4\]"),
        ("pyramid", "huggingface", "equally many experts"),
        ("biases", "huggingface", "they are sigmoids"),
    ],
)
def test_what_the_target_does_not_have(name: str, to: str, message: str, tmp_path: Path) -> None:
    source = _save(tmp_path, SHAPE.model_copy(update={"moe": OURS[name]}))
    with pytest.raises(CheckpointError, match=re.escape(message) if "[" not in message else message):
        convert(source, tmp_path / "target", to=to)
    assert not (tmp_path / "target").exists()


def test_sigmoid_scores_through_megatron(tmp_path: Path) -> None:
    source = _save(tmp_path, SHAPE.model_copy(update={"moe": OURS["biases"]}))
    expected = convert(source, tmp_path / "theirs", to="megatron-legacy", layout=Layout(2, 1, 2)).fingerprint
    back = convert(tmp_path / "theirs", tmp_path / "ours", to="canonical")
    found = back.source.model.shape.moe
    assert back.fingerprint == expected and found is not None and (found.top_k, found.bias_update_rate) == (3, 0.01)


def test_a_model_of_an_expert_per_cluster_is_projected_first(tmp_path: Path) -> None:
    moe = MixtureOfExperts(experts=4, route="cluster")
    source = _save(tmp_path, SHAPE.model_copy(update={"moe": moe}))
    with pytest.raises(CheckpointError, match=r"a model of 4 experts, one per cluster: .*specialm project"):
        open_source(source)


def test_fingerprints_have_logits(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["qwen3-moe"], tmp_path / "theirs", to="huggingface")
    found = read_fingerprint(tmp_path / "theirs")
    assert found is not None and len(found.logits) == len(Probe(SHAPE, VOCABULARY).tokens)
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["num_experts"] == written["num_local_experts"] == 6  # for Transformers 4 too
    assert read_config(tmp_path / "theirs" / "config.json").shape.moe == MixtureOfExperts(
        experts=6, top_k=1, ffn_hidden_size=40, aux_loss=0.001
    )
