"""Checkpoints of Transformers' own making, converted there and back; what is swapped, lost or damaged on the way is named."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from megatron_specialm.base.artifacts import begin_artifact
from megatron_specialm.base.errors import ArtifactError, CheckpointError, MachineError, SpecialmError
from megatron_specialm.base.files import MANIFEST, sha256_json, write_json
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.slices import slice_key
from megatron_specialm.checkpoint.steps import declare_final
from megatron_specialm.cli.app import app
from megatron_specialm.config.architectures import read_config
from megatron_specialm.config.model import LowRank, ModelConfig
from megatron_specialm.convert import huggingface_folder
from megatron_specialm.convert import run as driver
from megatron_specialm.convert.fingerprint import FINGERPRINT, read_fingerprint
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.run import convert, open_convertible, stream
from megatron_specialm.convert.safetensors_writer import SafetensorsWriter
from megatron_specialm.data.tokenizer_making import train_sentencepiece
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.merge import merge_lora
from megatron_specialm.model.weights import weight_specs
from tests.checkpoints import CONFIGS, VOCABULARY, assert_same_logits, random_model, save_random_model

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family. One has several files."""
    root = tmp_path_factory.mktemp("sources")
    return {
        name: save_random_model(name, root / name.replace(" ", ""), max_shard_size="30KB" if name == "qwen2" else "5GB")
        for name in CONFIGS
    }


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.usefixtures("alone")
@torch.no_grad()
def test_a_family_there_and_back(family: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Bits are equal; and Megatron-Core, the probe of fingerprints and Transformers compute the same logits."""
    done = convert(sources[family], tmp_path / "ours", to="canonical")
    back = convert(tmp_path / "ours", tmp_path / "theirs", to="huggingface")
    assert back.fingerprint == done.fingerprint == read_fingerprint(tmp_path / "theirs")
    before, after = _tensors(sources[family]), _tensors(tmp_path / "theirs")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    opened = open_source(tmp_path / "ours")
    length = 1024 if family == "llama 3" else 64  # so long that scaled rotations show
    tokens = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    model = Gpt(opened.model.shape, vocabulary_size=VOCABULARY, context_length=length).train(False)
    model.load(opened.weights)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    expected = random_model(family)(tokens).logits
    assert_same_logits(theirs(tokens).logits, expected)
    assert_same_logits(model.logits(tokens), expected)

    probe = done.fingerprint
    logits = theirs(torch.tensor([probe.tokens])).logits[0][:, probe.places]
    assert_same_logits(logits, torch.tensor(probe.logits))


def test_what_is_rounded_has_a_fingerprint_of_its_own(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["llama"], tmp_path / "ours", to="canonical")
    half = convert(tmp_path / "ours", tmp_path / "half", to="huggingface", dtype=torch.bfloat16)
    assert half.fingerprint.weights != read_fingerprint(tmp_path / "ours" / "step_0000000").weights  # type: ignore[union-attr]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    convert(tmp_path / "half", tmp_path / "again", to="canonical")
    rounded = {name: tensor.bfloat16().float() for name, tensor in _tensors(sources["llama"]).items()}
    convert(tmp_path / "again", tmp_path / "whole", to="huggingface")
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in _tensors(tmp_path / "whole").items())


def test_large_exports_have_an_index(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_folder, "SHARD_BYTES", 30_000)
    convert(sources["qwen2"], tmp_path / "theirs", to="huggingface")
    files = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    expected = random_model("qwen2").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())


def test_files_have_the_usual_mode(sources: dict[str, Path], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        convert(sources["llama"], tmp_path / "theirs", to="huggingface")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "theirs").iterdir()} == {0o640}


def test_conversion_imports_neither_megatron_nor_deepspeed(sources: dict[str, Path], tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from megatron_specialm.convert.run import convert; "
        f"convert(Path({str(sources['neox'])!r}), Path({str(tmp_path / 'ours')!r}), to='canonical'); "
        f"convert(Path({str(tmp_path / 'ours')!r}), Path({str(tmp_path / 'theirs')!r}), to='huggingface'); "
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('megatron', 'deepspeed')))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


# --- what a fingerprint catches -----------------------------------------------------------------------------------------


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change an export's tensors as a faulty program would."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _swap_layers(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _swap_queries_and_keys(tensors: dict[str, torch.Tensor]) -> None:
    place = "model.layers.2.self_attn.{}_proj.weight"
    tensors[place.format("q")], tensors[place.format("k")] = tensors[place.format("k")], tensors[place.format("q")]


def _transpose(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = tensors[name].t().contiguous()


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (_swap_layers, r"decoder\.layers\.0\.input_layernorm\.weight \(has the content of decoder\.layers\.1\.input_layernorm"),
        (_swap_queries_and_keys, r"says: decoder\.layers\.2\.self_attention\.linear_qkv\.weight:"),
        (_transpose, r"says: decoder\.layers\.1\.self_attention\.linear_proj\.weight:"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named(
    fault: Callable[[dict[str, torch.Tensor]], None], names: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    convert(sources["llama"], tmp_path / "theirs", to="huggingface")
    _rewrite(tmp_path / "theirs", fault)
    with pytest.raises(CheckpointError, match=names):
        convert(tmp_path / "theirs", tmp_path / "ours", to="canonical")
    assert not (tmp_path / "ours").exists() and len(list(tmp_path.iterdir())) == 1


def test_a_setting_that_was_lost_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["llama"], tmp_path / "theirs", to="huggingface")
    path = tmp_path / "theirs" / "config.json"
    settings = json.loads(path.read_text())
    settings["rope_parameters"]["rope_theta"] = 10_000.0
    write_json(path, settings)
    with pytest.raises(CheckpointError, match="rotary_base is 10000, and its fingerprint says 700"):
        stream(open_source(tmp_path / "theirs"))


def test_a_writer_that_swaps_tensors_leaves_nothing(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SafetensorsWriter.write

    def swapped(self: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        write(self, re.sub(r"layers\.[01]", lambda place: place[0][:-1] + "10"[int(place[0][-1])], name), tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", swapped)
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.0\.input_layernorm\.weight \(has the content"):
        convert(sources["llama"], tmp_path / "theirs", to="huggingface")
    assert not list(tmp_path.iterdir())


def test_adapters_are_merged_and_slices_of_ranks_joined(tmp_path: Path) -> None:
    shape = ModelConfig(layers=2, hidden_size=32, ffn_hidden_size=48, attention_heads=4, lora=LowRank(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    specs = weight_specs(shape, vocabulary_size=VOCABULARY)
    weights = {name: torch.randn(spec.shape, generator=generator) for name, spec in specs.items()}
    state = {
        "model": shape.model_dump(mode="json"),
        "vocabulary_size": VOCABULARY,
        "context_length": 16,
        "tokenizer": "t",
    }
    whole = weights["decoder.final_layernorm.weight"]  # in two slices, as two ranks would write it
    slices = {slice_key("decoder.final_layernorm.weight", (slice(start, start + 16),), (32,)): whole[start : start + 16]
              for start in (0, 16)}  # fmt: skip
    stored = {name: tensor for name, tensor in weights.items() if tensor is not whole} | slices
    save_checkpoint(tmp_path, step=3, weights=stored, optimizer_state={}, state=state)
    opened, merged = open_source(tmp_path / "step_0000003"), merge_lora(weights, shape)
    assert opened.model.shape == shape.base_config and opened.step == 3 and opened.tokenizer_fingerprint == "t"
    assert opened.weights.keys() == merged.keys()
    assert all(torch.equal(opened.weights[name][()], weight) for name, weight in merged.items())
    assert (
        opened.dtype == torch.float32
        and stream(opened) == convert(opened.path, tmp_path / "x", to="megatron").fingerprint
    )


# --- bad input --------------------------------------------------------------------------------------------------------


def _edit(name: str, **changes: object) -> Damage:
    def damage(folder: Path) -> None:
        settings = json.loads((folder / name).read_text())
        write_json(folder / name, {**settings, **changes})

    return damage


def _drop(name: str) -> Damage:
    return lambda folder: _rewrite(folder, lambda tensors: [tensors.pop(name)].clear())


def _cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)


def _lying_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + content[8:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit("config.json", architectures=["LlamaFourForCausalLM"]), "not known; the nearest is LlamaForCausalLM"),
        (_edit("config.json", attention_bias=True), "attention_bias is True, which cannot be converted"),
        (_edit("config.json", quantization_config={"bits": 4}), "quantized"),
        (_edit("config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}), "of type yarn"),
        (_edit("config.json", intermediate_size=64), r"down_proj\.weight has shape \(32, 48\), .* makes it \(32, 64\)"),
        (_edit("config.json", num_hidden_layers=4), r"layers\.3\.input_layernorm\.weight is missing"),
        (_edit("config.json", num_hidden_layers=2), r"model\.layers\.2\..* has no place"),
        (_edit("config.json", tie_word_embeddings=True), r"lm_head\.weight differs from model\.embed_tokens\.weight"),
        (_drop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight is missing"),
        (_cut, "not a file of tensors"),
        (_lying_header, "not a file of tensors"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "weights"), "has neither model.safetensors nor"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    ],
)  # fmt: skip
def test_a_damaged_source_is_refused_and_leaves_no_target(
    damage: Damage, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(sources["llama"], tmp_path / "source")
    damage(source)
    with pytest.raises(ArtifactError, match=message):
        convert(source, tmp_path / "target", to="canonical")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_pythias_parallel_residual_is_refused_with_the_reason(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["neox"], tmp_path / "source")
    _edit("config.json", use_parallel_residual=True)(source)
    with pytest.raises(CheckpointError, match=r"use_parallel_residual is True.*Pythia"):
        read_config(source / "config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: next(folder.glob("model-00002*")).unlink(), "no such file"),
        (_edit("model.safetensors.index.json", weight_map={"x": "../model.safetensors"}), "is no file of its folder"),
        (_edit("model.safetensors.index.json", weight_map={"x": "model-00001-of-00004.safetensors"}), "not"),
    ],
)
def test_a_damaged_index_is_refused(damage: Damage, message: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["qwen2"], tmp_path / "source")
    damage(source)
    with pytest.raises(ArtifactError, match=message):
        open_source(source)


def test_a_target_that_exists_and_a_full_disk_are_refused_before_anything_is_written(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="is there already"):
        convert(sources["llama"], sources["qwen2"], to="canonical")
    monkeypatch.setattr(driver.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))  # type: ignore[attr-defined]
    with pytest.raises(MachineError, match="GiB free"):
        convert(sources["llama"], tmp_path / "target", to="canonical")
    assert not list(tmp_path.iterdir())


def test_pickled_weights_are_read_without_executing_them(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["llama"], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    assert convert(source, tmp_path / "ours", to="canonical").fingerprint == stream(open_source(sources["llama"]))
    torch.save({**tensors, "run": os.system}, source / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="system"):
        convert(source, tmp_path / "again", to="canonical")


def test_a_tied_copy_and_buffers_are_left_out_and_listed(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["llama 3"], tmp_path / "source")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    _rewrite(source, add)
    done = convert(source, tmp_path / "ours", to="canonical")
    assert done.source.dropped == {
        "lm_head.weight": "equal to model.embed_tokens.weight, to which it is tied",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "a buffer that follows from the config",
    }


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, size: int) -> Path:
    """A word-level tokenizer of so many ids."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w5", "eos_token": "w7"}
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def test_a_tokenizer_goes_along_through_every_format(sources: dict[str, Path], tmp_path: Path) -> None:
    source = _tokenizer(shutil.copytree(sources["llama"], tmp_path / "source"), VOCABULARY)
    before = source
    for to in ("canonical", "megatron", "megatron-legacy", "huggingface"):
        convert(before, tmp_path / to, to=to)
        before = tmp_path / to
    loaded = AutoTokenizer.from_pretrained(before)
    assert loaded("w3 w4").input_ids == [3, 4]
    expected = AutoConfig.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(before)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (expected.bos_token_id, expected.eos_token_id)
    (tmp_path / "megatron" / "release" / "generation_config.json").unlink()
    ids = open_convertible(tmp_path / "megatron").model.special_ids
    assert (ids["bos_token_id"], ids["eos_token_id"]) == (5, 7), "Megatron-LM keeps none: the tokenizer says them"


def test_a_run_knows_the_tokenizer_of_its_training(tmp_path: Path) -> None:
    """It is exported as an `export` stage does: Transformers begins a text with the end-of-document token."""
    root = tmp_path / "run"
    made = begin_artifact(root, "tokenizer", "generic", digest="t" * 64)
    texts = [f"Once upon a time there was a model, number {number}." for number in range(200)]
    ours = train_sentencepiece(texts, made, vocabulary_size=300, algorithm="bpe", sample_characters=100_000)
    shape = ModelConfig(family="llama", layers=1, hidden_size=32, ffn_hidden_size=48, attention_heads=4)
    size = ours.vocabulary_size
    made_from = {"inputs": {"tokens/generic": "s" * 64, "tokenizer/generic": "t" * 64}}
    training = begin_artifact(root, "slm", "generic", digest=sha256_json(made_from), made_from=made_from)
    weights = {name: torch.randn(spec.shape) for name, spec in weight_specs(shape, vocabulary_size=size).items()}
    state = {"model": shape.model_dump(mode="json"), "vocabulary_size": size, "context_length": 16, "tokenizer": "t"}
    save_checkpoint(training, step=3, weights=weights, optimizer_state={}, state=state)
    declare_final(training, step=3)
    convert(training, tmp_path / "theirs", to="huggingface")
    loaded, config = (kind.from_pretrained(tmp_path / "theirs") for kind in (AutoTokenizer, AutoConfig))
    assert loaded("Once").input_ids == [ours.eod, *ours.encode(["Once"])[0].tolist()]
    assert config.bos_token_id == config.eos_token_id == ours.eod and loaded.model_max_length == 16


def test_the_tokenizer_of_another_model_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    other = _tokenizer(tmp_path / "other", VOCABULARY + 1)
    with pytest.raises(CheckpointError, match="has ids up to 99, and the model 99 rows"):
        convert(sources["llama"], tmp_path / "ours", to="canonical", tokenizer=other)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        convert(sources["llama"], tmp_path / "ours", to="canonical", tokenizer=sources["llama"])
    assert not (tmp_path / "ours").exists()


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_commands(sources: dict[str, Path], tmp_path: Path) -> None:
    runner = CliRunner()

    def specialm(*words: object, code: int = 0) -> str:
        done = runner.invoke(app, list(map(str, words)))
        assert done.exit_code == code, (done.output, done.exception)
        return done.output

    told = specialm("convert", sources["qwen3"], tmp_path / "ours", "--to", "canonical")
    assert "read back, and every weight is equal" in told
    told = specialm("inspect", tmp_path / "ours", "--verify", "--tensors")
    assert "canonical, family llama" in told and "q_layernorm" in told and "the logits are as recorded" in told
    assert "27 of 27 weights are equal" in specialm("diff", sources["qwen3"], tmp_path / "ours")
    specialm("convert", tmp_path / "ours", tmp_path / "half", "--to", "huggingface", "--dtype", "bf16")
    told = specialm("diff", sources["qwen3"], tmp_path / "half", code=1)
    assert "linear_fc1" in told and "differs" not in told
    done = runner.invoke(app, ["inspect", str(tmp_path)])
    assert isinstance(done.exception, SpecialmError)


def test_an_export_lists_its_files_and_has_no_pickle(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["llama"], tmp_path / "theirs", to="huggingface")
    listed = set(json.loads((tmp_path / "theirs" / MANIFEST).read_text())["files"])
    assert listed == {path.name for path in (tmp_path / "theirs").iterdir()} - {MANIFEST}
    assert FINGERPRINT in listed
    with safe_open(tmp_path / "theirs" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
