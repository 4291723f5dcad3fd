"""Megatron-Core's torch_dist checkpoints: what megatron-core wrote is read, in each form, and damage is refused by name."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.torch_dist import open_torch_dist, recognize
from tests.conftest import copied

pytestmark = pytest.mark.slow  # megatron-core saves first, on four processes
ITERATION = "iter_0000003"


@pytest.fixture(scope="module")
def truth(megatron_saved: Path) -> dict[str, torch.Tensor]:
    """Whole tensors, as megatron-core loads them."""
    return load_file(megatron_saved / "truth.safetensors")


def _weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")}


def test_what_megatron_core_saved_is_read(megatron_saved: Path, truth: dict[str, torch.Tensor]) -> None:
    assert recognize(megatron_saved / "stacked") and recognize(megatron_saved / "stacked" / ITERATION)
    found = open_torch_dist(megatron_saved / "stacked")
    assert found.folder == megatron_saved / "stacked" / ITERATION
    assert (found.step, found.optimizer_step, found.others) == (3, 1, [])
    assert set(found.tensors) == set(_weights(truth))
    for name, tensor in found.tensors.items():
        assert tensor.shape == truth[name].shape and tensor.dtype == torch.float32
        assert torch.equal(tensor[()], truth[name]), name
    for name, tensor in found.optimizer.items():
        moment, _, weight = name.partition("/")
        assert torch.equal(tensor[()], truth[f"optimizer.state.{moment}.{weight}"]), name
    assert len(found.optimizer) == 2 * len(found.tensors)
    assert found.settings["tensor_model_parallel_size"] == 2 and found.settings["params_dtype"] == torch.float32
    assert found.settings["attention_backend"] == 3 and found.settings["save"] == "checkpoints"
    assert "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4" in found.objects


@pytest.mark.parametrize(
    "box", [(slice(1, 3), slice(10, 60), slice(5, 20)), (slice(2, 3),), (slice(0, 0),), (slice(None), slice(90, 96))]
)
def test_slices_across_chunks_are_read(megatron_saved: Path, truth: dict[str, torch.Tensor], box: tuple) -> None:
    name = "decoder.layers.mlp.linear_fc1.weight"  # per layer, gate and up, each cut in two: 16 chunks
    assert torch.equal(open_torch_dist(megatron_saved / "stacked").tensors[name][box], truth[name][box])


@pytest.mark.parametrize("form", ["singleton", "per_layer"])
def test_forms_with_a_tensor_per_layer_have_the_same_weights(
    megatron_saved: Path, truth: dict[str, torch.Tensor], form: str
) -> None:
    found = open_torch_dist(megatron_saved / form)
    whole = {name: tensor[()] for name, tensor in found.tensors.items()}
    for name, stacked in _weights(truth).items():
        for layer, expected in enumerate(stacked) if ".layers." in name else [(0, stacked)]:
            own = name.replace(".layers.", f".layers.{layer}.")
            parts = [f"{own}_w", f"{own}_v"] if form == "singleton" and own.endswith("fc1.weight") else [own]
            assert torch.equal(torch.cat([whole.pop(part) for part in parts]), expected), own
    assert not whole


def test_reading_imports_no_megatron_and_starts_no_process_group(megatron_saved: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from megatron_specialm.convert.torch_dist import open_torch_dist; "
        f"found = open_torch_dist(Path({str(megatron_saved / 'singleton')!r})); [t[()] for t in found.tensors.values()]; "
        "import torch.distributed as dist; "
        "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'deepspeed')], dist.is_initialized())"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[] False"


@pytest.fixture
def damaged(megatron_saved: Path, tmp_path: Path) -> Path:
    """A copy of an iteration."""
    return copied(megatron_saved / "stacked" / ITERATION, tmp_path)


def _edit(folder: Path, change: Callable[[object], None]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # of our own making
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _move(metadata: object, file: str) -> None:
    for info in metadata.storage_data.values():  # type: ignore[attr-defined]
        info.relative_path = file


def _grow(metadata: object) -> None:
    for info in metadata.storage_data.values():  # type: ignore[attr-defined]
        info.length += 10**9


def _shift(metadata: object) -> None:
    for entry in metadata.state_dict_metadata.values():  # type: ignore[attr-defined]
        for chunk in getattr(entry, "chunks", []):
            chunk.sizes = torch.Size(size + 1 for size in chunk.sizes)


def _drop(metadata: object) -> None:
    for entry in metadata.state_dict_metadata.values():  # type: ignore[attr-defined]
        if hasattr(entry, "chunks"):
            entry.chunks = entry.chunks[1:]


def _double(metadata: object) -> None:
    for entry in metadata.state_dict_metadata.values():  # type: ignore[attr-defined]
        if hasattr(entry, "chunks"):
            entry.chunks = [entry.chunks[0], *entry.chunks[:-1]] if len(entry.chunks) > 1 else entry.chunks


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


DAMAGES = {
    "code in .metadata": (lambda d: (d / ".metadata").write_bytes(pickle.dumps(_Evil())), "asks for posix.system"),
    "code in common.pt": (lambda d: torch.save({"args": _Evil()}, d / "common.pt"), "asks for posix.system"),
    "a path outside": (lambda d: _edit(d, lambda m: _move(m, "../__0_0.distcp")), "outside of its folder"),
    "an absolute path": (lambda d: _edit(d, lambda m: _move(m, "/etc/passwd")), "outside of its folder"),
    "the folder above": (lambda d: _edit(d, lambda m: _move(m, "..")), "is missing|outside"),
    "lengths that lie": (lambda d: _edit(d, _grow), "bytes, and .metadata names"),
    "shapes that lie": (lambda d: _edit(d, _shift), "leaves the shape"),
    "a chunk missing": (lambda d: _edit(d, _drop), "of its .* elements"),
    "a chunk twice": (lambda d: _edit(d, _double), "which .* has too|of its .* elements"),
    "a rank's file missing": (lambda d: (d / "__2_0.distcp").unlink(), "__2_0.distcp: is missing"),
    "a rank's file cut": (lambda d: os.truncate(d / "__1_0.distcp", 900), "__1_0.distcp: has 900 bytes"),
    ".metadata cut": (lambda d: os.truncate(d / ".metadata", 900), "not a pickle"),
    ".metadata of another kind": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps({})),
        ".metadata: not the metadata",
    ),
    "another backend": (lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "'zarr'"),
    "no JSON": (lambda d: (d / "metadata.json").write_text("{"), "not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_and_nothing_executed(damaged: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(damaged)
    damage, message = DAMAGES[name]
    damage(damaged)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_torch_dist(damaged)
    assert str(damaged) in str(caught.value)
    assert not Path("executed").exists()


def test_bytes_that_are_another_tensor_are_refused(damaged: Path) -> None:
    def swap(metadata: object) -> None:
        places = metadata.storage_data  # type: ignore[attr-defined]
        one, two = (
            next(key for key in places if key.fqn == name) for name in ("decoder.final_layernorm.weight", name_of_other)
        )
        places[one], places[two] = places[two], places[one]

    name_of_other = "output_layer.weight"
    _edit(damaged, swap)
    with pytest.raises(CheckpointError, match=r"says a tensor of shape \(32,\)"):
        open_torch_dist(damaged).tensors["decoder.final_layernorm.weight"][()]


def test_an_iteration_that_is_not_there_is_refused(tmp_path: Path, megatron_saved: Path) -> None:
    shutil.copy(megatron_saved / "stacked" / "latest_checkpointed_iteration.txt", tmp_path)
    with pytest.raises(CheckpointError, match="iter_0000003 does not exist"):
        open_torch_dist(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError, match="not the number of an iteration"):
        open_torch_dist(tmp_path)


def test_experts_are_read_stacked_and_apart(megatron_saved: Path) -> None:
    """Of an expert-parallel model: a tensor over layers and experts, or one for each, which have the same numbers."""
    whole = load_file(megatron_saved / "truth-moe.safetensors")
    stacked = open_torch_dist(megatron_saved / "moe-stacked").tensors
    assert set(stacked) == set(whole) and all(torch.equal(stacked[name][()], whole[name]) for name in whole)
    assert stacked["decoder.layers.mlp.experts.experts.linear_fc1.weight"].shape == (4, 4, 96, 32)  # of 2 x 2 ranks
    apart = open_torch_dist(megatron_saved / "moe-singleton").tensors
    for layer in range(4):
        for expert in range(4):
            own = f"decoder.layers.{layer}.mlp.experts.experts.{expert}"
            gate_up = torch.cat([apart[f"{own}.linear_fc1.weight_w"][()], apart[f"{own}.linear_fc1.weight_v"][()]])
            assert torch.equal(gate_up, whole["decoder.layers.mlp.experts.experts.linear_fc1.weight"][layer, expert])
            down = whole["decoder.layers.mlp.experts.experts.linear_fc2.weight"][layer, expert]
            assert torch.equal(apart[f"{own}.linear_fc2.weight"][()], down)
