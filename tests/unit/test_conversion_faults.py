"""Sources with faults that no fingerprint shows: each is named with its file, and nothing is executed, unpacked or written."""

import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_specialm.base.errors import ArtifactError, CheckpointError
from megatron_specialm.base.files import REMAKE
from megatron_specialm.config.architectures import read_config
from megatron_specialm.convert.formats import open_source
from megatron_specialm.convert.lazy import agreed
from megatron_specialm.convert.run import convert
from megatron_specialm.convert.source import Layout
from megatron_specialm.convert.tokenizer_files import check_tokenizer
from megatron_specialm.convert.torch_zip import read_torch_zip
from tests.checkpoints import save_random_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model("llama", tmp_path_factory.mktemp("llama") / "model")


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def _without_fingerprint(folder: Path) -> Path:
    for path in folder.rglob("fingerprint.json"):
        path.unlink()
    return folder


def _pickled(llama: Path, folder: Path, content: Any) -> Path:
    """A folder with such a pytorch_model.bin."""
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def test_no_record_of_an_archive_is_unpacked(tmp_path: Path) -> None:
    for record in ("data.pkl", "byteorder", "version", "data/0"):
        path = tmp_path / f"{record.replace('/', '-')}.bin"
        with zipfile.ZipFile(path, "w") as archive:
            for name in dict.fromkeys(["data.pkl", "byteorder", record]):
                kind = zipfile.ZIP_DEFLATED if name == record else zipfile.ZIP_STORED
                archive.writestr(f"a/{name}", b"\x80\x02}." if name == "data.pkl" else b"little", kind)
        with pytest.raises(CheckpointError, match=f"{record} is compressed"):
            read_torch_zip(path)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(2**40), tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="more than its storage has"):
        read_torch_zip(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"pytorch_model\.bin: holds a list, not a dict of tensors"),
        ({3: torch.zeros(3)}, "the key 3 holds a FileTensor"),
        ({"a.weight": "text"}, "the key a.weight holds a str"),
        ({"state_dict": {"a.weight": torch.zeros(3)}}, r"the key state_dict holds a dict.*state_dict\(\) alone"),
        ({}, "model: .* is missing"),
    ],
)
def test_pickled_weights_are_a_dict_of_tensors(llama: Path, tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_source(_pickled(llama, tmp_path / "model", content))


def test_a_tensor_in_two_pickled_shards_is_refused(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    folder = _pickled(llama, tmp_path / "model", {})
    (folder / "pytorch_model.bin").unlink()
    twice = next(iter(tensors))
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for file, content in zip(files, (tensors, {twice: tensors[twice] * 7}), strict=True):
        torch.save(content, folder / file)
    places = {name: files[name == twice] for name in tensors}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=rf"00002-of-00002\.bin: has {twice}, which another file"):
        open_source(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": -1}, "vocabulary size is -1"),
        ({"vocab_size": "500"}, "vocabulary size is '500'"),
        ({"max_position_embeddings": None}, "context length is None"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None, not a number"),
        ({"initializer_range": []}, r"initializer_range is \[\]"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rotary scaling of type yarn cannot.*type llama3, low",
        ),
        ({"rope_parameters": 3}, "not a config of Transformers"),
        ({"layer_types": 3}, "not a config of Transformers"),
        ({"architectures": [["LlamaForCausalLM"]]}, "not a config of Transformers"),
    ],
)
def test_a_config_of_wrong_types_is_named(llama: Path, tmp_path: Path, changes: dict, message: str) -> None:
    config = json.loads((llama / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=rf"config\.json: .*{message}"):
        read_config(tmp_path / "config.json")


# --- what several ranks hold --------------------------------------------------------------------------------------------


def test_copies_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_specialm.convert.lazy.COMPARED_ELEMENTS", 4)
    first = torch.arange(10.0).view(5, 2)
    first[1, 0] = torch.nan
    other = first.clone()
    found = agreed({"rank 0": first, "rank 1": other}, "w", Path("folder"))
    assert torch.equal(found[slice(2, 5), slice(0, 1)], first[2:, :1])
    assert found[()].isnan().sum() == 1
    other[4, 1] = 7
    assert torch.equal(found[slice(0, 4),][2:], first[2:4])
    with pytest.raises(CheckpointError, match="folder: w differs between rank 0 and rank 1"):
        found[()]
    with pytest.raises(CheckpointError, match="differs"):
        agreed({"rank 0": torch.zeros(()), "rank 1": torch.ones(())}, "w", Path("folder"))[()]


def _change(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    content = torch.load(file, weights_only=False)  # of our own making
    change(content["model"])
    torch.save(content, file)


def test_ranks_of_a_legacy_checkpoint_must_agree(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    convert(llama, folder, to="megatron-legacy", layout=Layout(tensor_parallel=2))
    _without_fingerprint(folder)
    shutil.copytree(folder / "release" / "mp_rank_01", folder / "release" / "mp_rank_02")
    with pytest.raises(CheckpointError, match=r"mp_rank_02: no rank of tensor parallelism 2.*move it away"):
        open_source(folder)
    shutil.rmtree(folder / "release" / "mp_rank_02")
    name = "decoder.final_layernorm.weight"
    _change(folder / "release" / "mp_rank_01" / "model_optim_rng.pt", lambda model: model[name].mul_(100))
    with pytest.raises(
        CheckpointError, match=rf"{name} differs between tensor-parallel rank 0 and tensor-parallel rank 1"
    ):
        convert(folder, tmp_path / "target", to="canonical")
    assert not (tmp_path / "target").exists()


def test_ranks_of_experts_must_agree_and_equal_experts_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save_random_model("mixtral", tmp_path / "mixtral")
    folder = tmp_path / "theirs"
    convert(source, folder, to="megatron-legacy", layout=Layout(expert_parallel=2))
    ranks = [
        _without_fingerprint(folder) / "release" / f"mp_rank_00_00{rank}" / "model_optim_rng.pt" for rank in (0, 1)
    ]
    open_source(folder)
    assert "are equal" not in caplog.text
    kept = ranks[1].read_bytes()
    name = "decoder.final_layernorm.weight"
    _change(ranks[1], lambda model: model[name].mul_(100))
    with pytest.raises(CheckpointError, match=rf"{name} differs between mp_rank_00_000 .*mp_rank_00_001"):
        convert(folder, tmp_path / "target", to="canonical")
    ranks[1].write_bytes(kept)
    shutil.copyfile(ranks[0], ranks[1])
    with caplog.at_level(logging.WARNING):
        open_source(folder)
    assert "layers.0.mlp.experts.local_experts.0.linear_fc1.weight and" in caplog.text and "are equal" in caplog.text


def test_files_of_other_ranks_and_attempts_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deepspeed"
    convert(llama, folder, to="deepspeed", layout=Layout(zero_stage=1, data_parallel=2))
    assert open_source(folder).layout == "ZeRO 1"
    step = folder / "global_step0"
    for own, other in (
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_2_mp_rank_00_optim_states.pt"),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
    ):
        shutil.copyfile(step / own, step / other)
        with pytest.raises(CheckpointError, match=r"states\.pt: "):
            open_source(folder)
        (step / other).unlink()
    convert(llama, tmp_path / "megatron", to="megatron")
    file = next((tmp_path / "megatron" / "release").glob("*.distcp"))
    shutil.copyfile(file, file.with_name("__9_0.distcp"))
    with pytest.raises(CheckpointError, match=r"__9_0\.distcp: \.metadata does not name it"):
        open_source(tmp_path / "megatron")


# --- tokenizers, special ids, remedies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.model": "garbage"}, r"tokenizer\.model: not a tokenizer"),
        ({"vocab.json": json.dumps({"a": 5000})}, r"vocab\.json: has ids up to 5000, and the model 500 rows"),
        ({"vocab.json": json.dumps({"a": 3}), "added_tokens.json": json.dumps({"b": 500})}, "has ids up to 500"),
        ({"vocab.json": json.dumps({"a": "b"})}, r"vocab\.json: a: "),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json: not a tokenizer"),
    ],
)
def test_a_tokenizer_of_any_form_is_checked(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ArtifactError, match=message) as raised:
        check_tokenizer(tmp_path, vocabulary_size=500)
    assert REMAKE not in str(raised.value)


@pytest.mark.parametrize("to", ["megatron", "megatron-legacy"])
def test_all_end_tokens_go_along_through_megatron(llama: Path, tmp_path: Path, to: str) -> None:
    folder = _copy(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": [5, 6]}
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "ours", to=to)
    convert(tmp_path / "ours", tmp_path / "back", to="huggingface")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (back["bos_token_id"], back["eos_token_id"]) == (1, [5, 6])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "fingerprint.json"])
def test_nobody_is_told_to_remove_a_source(llama: Path, tmp_path: Path, name: str) -> None:
    convert(llama, tmp_path / "ours", to="huggingface")
    (tmp_path / "ours" / name).write_text("[")
    with pytest.raises(ArtifactError, match=r"copy .* again") as raised:
        open_source(tmp_path / "ours")
    assert REMAKE not in str(raised.value)


def test_nobody_is_told_to_remove_a_step(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "ours", to="canonical")
    file = next((tmp_path / "ours").glob("step_*/model-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="bytes have changed: copy the checkpoint again"):
        open_source(tmp_path / "ours")
