"""Adam's moments go along where both formats have them, and what is left out is said."""

import argparse
import io
import pickle
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.checkpoint.saving import save_checkpoint
from megatron_specialm.checkpoint.steps import declare_final
from megatron_specialm.config.architectures import Model
from megatron_specialm.config.model import LowRank, ModelConfig
from megatron_specialm.convert.adam import MOMENTS, AdamState
from megatron_specialm.convert.formats import TARGETS, open_source
from megatron_specialm.convert.huggingface_folder import write_config
from megatron_specialm.convert.run import convert, hash_moments, stream
from megatron_specialm.convert.source import Layout, Source
from megatron_specialm.convert.torch_dist import open_torch_dist
from megatron_specialm.convert.torch_dist_writing import write_torch_dist
from megatron_specialm.model.weights import weight_specs
from tests.training import run_training, stage

VOCABULARY, STEP, UPDATES = 99, 7, 6  # one step was skipped
_SIZES = {"layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "attention_heads": 4}
SHAPES = {
    "neox": ModelConfig(**_SIZES),
    "llama": ModelConfig(family="llama", **_SIZES, query_groups=2),
    "qwen2": ModelConfig(family="llama", **_SIZES, query_groups=2, qkv_bias=True),
    "qwen3": ModelConfig(family="llama", **_SIZES, kv_channels=16, qk_norm=True),
}
HOPS = {
    "megatron": Layout(tensor_parallel=2),
    "deepspeed": Layout(),
    "ZeRO-1": Layout(zero_stage=1, data_parallel=3),
}


def save_training(folder: Path, shape: ModelConfig, *, frozen: str = "") -> Path:
    """A training of ours that has ended, with random weights and moments."""
    generator = torch.Generator().manual_seed(0)
    specs = weight_specs(shape, vocabulary_size=VOCABULARY)
    weights = {name: torch.randn(spec.shape, generator=generator) for name, spec in specs.items()}
    moments = {
        f"{kind}/{name}": torch.rand(tensor.shape, generator=generator)
        for kind in MOMENTS
        for name, tensor in weights.items()
        if name != frozen
    }
    state = {
        "model": shape.model_dump(mode="json"), "vocabulary_size": VOCABULARY, "context_length": 16, "learning_rate": 0.25,
        "progress": {"step": STEP},
    }  # fmt: skip
    optimizer = {**moments, "step": torch.tensor(float(UPDATES))}
    save_checkpoint(folder, step=STEP, weights=weights, optimizer_state=optimizer, state=state)
    declare_final(folder, step=STEP)
    return folder


def _convert(source: Path, target: Path, name: str, **settings) -> Source:
    convert(source, target, to="deepspeed" if name == "ZeRO-1" else name, layout=HOPS[name], **settings)
    return open_source(target)


@pytest.mark.parametrize(("family", "tied"), list(product(SHAPES, (False, True))))
def test_weights_and_moments_there_and_back(family: str, tied: bool, tmp_path: Path) -> None:
    """From our checkpoint through every other format to our checkpoint: bits are equal, and the files too."""
    shape = SHAPES[family].model_copy(update={"tie_embeddings": tied})
    before = save_training(tmp_path / "ours", shape)
    expected = (stream(open_source(before)), hash_moments(open_source(before)))
    for name in HOPS:
        opened = _convert(before, tmp_path / name, name)
        assert opened.step == STEP and opened.optimizer is not None and opened.optimizer.step == UPDATES
        assert opened.optimizer.settings["lr"] == 0.25
        assert opened.fingerprint is not None and opened.fingerprint.moments == expected[1]
        assert (stream(opened), hash_moments(opened)) == expected
        before = tmp_path / name
    convert(before, tmp_path / "again", to="canonical")
    for part in ("model", "optimizer"):
        (one, other) = (
            load_file(tmp_path / f"{folder}/step_{STEP:07d}/{part}-00000.safetensors") for folder in ("ours", "again")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_in_bf16_the_main_weights_stay(tmp_path: Path) -> None:
    """The model is rounded, and what the optimizer goes on with is not."""
    source = save_training(tmp_path / "ours", SHAPES["llama"])
    expected = stream(open_source(source))
    for name in HOPS:
        opened = _convert(source, tmp_path / name, name, dtype=torch.bfloat16)
        assert opened.dtype == torch.float32 and stream(opened) == expected
        assert opened.rounded.keys() == opened.weights.keys()
        assert {tensor.dtype for tensor in opened.rounded.values()} == {torch.bfloat16}
    half = convert(source, tmp_path / "half", to="canonical", dtype=torch.bfloat16)
    assert "needs weights in fp32" in half.source.dropped["optimizer state"]


@pytest.mark.parametrize("name", ["huggingface", "megatron-legacy"])
def test_a_format_without_moments_says_so(name: str, tmp_path: Path) -> None:
    source = save_training(tmp_path / "ours", SHAPES["llama"])
    done = convert(source, tmp_path / "theirs", to=name)
    assert done.source.dropped["optimizer state"] == TARGETS[name].no_optimizer
    assert open_source(tmp_path / "theirs").optimizer is None and not done.fingerprint.moments


def test_moments_are_left_out_on_demand_and_where_some_are_missing(tmp_path: Path) -> None:
    source = save_training(tmp_path / "ours", SHAPES["llama"])
    done = convert(source, tmp_path / "weights", to="canonical", weights_only=True)
    assert done.source.dropped == {"optimizer state": "weights alone were asked for"}
    assert [path.name for path in (tmp_path / "weights").glob("step_*")] == ["step_0000000"]
    frozen = save_training(tmp_path / "frozen", SHAPES["llama"], frozen="decoder.final_layernorm.weight")
    assert open_source(frozen).dropped == {"optimizer state": "of some weights only: the others are frozen"}
    adapted = save_training(tmp_path / "adapted", ModelConfig(**_SIZES, lora=LowRank(rank=2, alpha=2)))
    assert open_source(adapted).dropped == {"optimizer state": "of adapters, which are merged"}


@pytest.mark.parametrize("name", HOPS)
def test_a_planted_fault_in_a_moment_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that mixes up the moments of two layers leaves nothing."""
    source = save_training(tmp_path / "ours", SHAPES["llama"])
    named = AdamState.named

    def mixed(self: AdamState, theirs):  # type: ignore[no-untyped-def]
        one, other = (f"exp_avg/decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in (0, 1))
        return named(
            replace(self, moments={**self.moments, one: self.moments[other], other: self.moments[one]}), theirs
        )

    monkeypatch.setattr(AdamState, "named", mixed)
    with pytest.raises(
        CheckpointError, match=r"exp_avg/decoder\.layers\.0\.mlp\.linear_fc1\.weight \(has the content of"
    ):
        _convert(source, tmp_path / "theirs", name)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_moment_that_changed_between_two_hops_is_named(tmp_path: Path) -> None:
    convert(save_training(tmp_path / "ours", SHAPES["llama"]), tmp_path / "theirs", to="deepspeed")
    path = next((tmp_path / "theirs").glob("global_step7/zero/model.norm.weight/exp_avg_sq.pt"))
    torch.save({"param": torch.zeros(32), "cat_dim": 0}, path)
    with pytest.raises(
        CheckpointError, match=r"not what its fingerprint says: exp_avg_sq/decoder\.final_layernorm\.weight:"
    ):
        convert(tmp_path / "theirs", tmp_path / "again", to="canonical")


def test_a_training_of_ours_goes_on_from_what_came_back(tmp_path: Path) -> None:
    """By way of two other formats, to the same bits."""
    shape = SHAPES["llama"]
    settings = {"model": shape, "steps": 8, "checkpoint": {"every": 4, "keep": 9}}
    run_training(tmp_path / "straight", ALONE, stage(**settings))
    (tmp_path / "config").mkdir()
    write_config(Model(shape, VOCABULARY + 1, 16, {}), tmp_path / "config", dtype=torch.float32)
    convert(tmp_path / "straight/step_0000004", tmp_path / "theirs", to="megatron", config=tmp_path / "config")
    convert(tmp_path / "theirs", tmp_path / "others", to="deepspeed", layout=HOPS["ZeRO-1"])
    convert(tmp_path / "others", tmp_path / "again", to="canonical")
    run_training(tmp_path / "again", ALONE, stage(**settings))
    one, other = (
        load_file(tmp_path / folder / "step_0000008" / "model-00000.safetensors") for folder in ("straight", "again")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "again" / "step_0000004").is_dir()


def test_what_all_ranks_share_is_read_where_megatron_core_0_19_has_it(tmp_path: Path) -> None:
    """As an object of its own instead of common.pt; and optimizers of several parts give their tensors a prefix."""
    convert(save_training(tmp_path / "ours", SHAPES["llama"]), tmp_path / "theirs", to="megatron")
    folder = tmp_path / "theirs" / f"iter_{STEP:07d}"
    expected = open_source(tmp_path / "theirs")
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # of our own making
    content = io.BytesIO()
    torch.save([torch.load(folder / "common.pt", weights_only=False)], content)
    (folder / "common.pt").unlink()
    (folder / "__1_0.distcp").write_bytes(content.getvalue())
    name = "common_state/shard_0_1"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__1_0.distcp", 0, len(content.getvalue()))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    found = open_source(tmp_path / "theirs")
    assert (found.model, found.step, found.dropped) == (expected.model, STEP, expected.dropped)
    assert found.optimizer is not None and found.optimizer.step == UPDATES
    assert (stream(found), hash_moments(found)) == (stream(expected), hash_moments(expected))


def test_the_flattened_form_of_before_megatron_core_0_14(tmp_path: Path) -> None:
    """Each process's part of a tensor is flattened; a dimension of the stored tensor counts the parts of each dimension."""
    expected = open_source(
        convert(save_training(tmp_path / "ours", SHAPES["llama"]), tmp_path / "theirs", to="megatron").target
    )
    opened = open_torch_dist(tmp_path / "theirs")

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        counts = [2 if size % 2 == 0 else 1 for size in tensor.shape]
        pairs = [size for count, whole in zip(counts, tensor.shape, strict=True) for size in (count, whole // count)]
        axes = [*range(0, len(pairs), 2), *range(1, len(pairs), 2)]
        return tensor.view(pairs).permute(axes).reshape(*counts, -1)

    flat = {name: cut(tensor[()]) for name, tensor in opened.optimizer.items()}
    folder = write_torch_dist(
        tmp_path / "flat", opened.tensors, step=STEP, common=_plain(opened.common, opened.settings), optimizer=flat
    )
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # of our own making
    metadata.mcore_data = {
        key: {"nd_reformulated_orig_global_shape": tuple(opened.optimizer[f"{kind}/{name}"].shape)}
        for key in metadata.state_dict_metadata
        if key.startswith("optimizer.state.")
        for kind, _, name in [key.removeprefix("optimizer.state.").replace("param.", "fp32.", 1).partition(".")]
    }
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    found = open_source(tmp_path / "flat")
    assert found.optimizer is not None and hash_moments(found) == hash_moments(expected)
    metadata.mcore_data = {}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    left = open_source(tmp_path / "flat")
    (reason,) = [reason for name, reason in left.dropped.items() if name.startswith("optimizer state")]
    assert left.optimizer is None and "has shape" in reason and stream(left) == stream(expected)


def _plain(common: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    state = common["optimizer"]["optimizer"]
    return {"args": argparse.Namespace(**settings), "iteration": STEP, "optimizer": {"optimizer": state}}
