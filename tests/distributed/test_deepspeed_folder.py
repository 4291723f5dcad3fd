"""DeepSpeed's checkpoints: what DeepSpeed wrote is read as its own tools read it, and damage is refused by name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.deepspeed_folder import open_deepspeed, recognize
from tests.conftest import copied

pytestmark = pytest.mark.slow  # DeepSpeed trains and saves first
TAG = "global_step3"


def _with_shared(found: Any) -> dict[str, Any]:
    return {**found.tensors, **{name: found.tensors[other] for name, other in found.shared.items()}}


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3", "zero1-bf16"])
def test_weights_are_those_of_zero_to_fp32(deepspeed_saved: Path, kind: str) -> None:
    assert recognize(deepspeed_saved / kind) and recognize(deepspeed_saved / kind / TAG)
    found, expected = open_deepspeed(deepspeed_saved / kind), load_file(deepspeed_saved / f"{kind}.safetensors")
    tensors = _with_shared(found)
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.shape == expected[name].shape
        assert torch.equal(tensor[()], expected[name]), name
    box = slice(3, 9), slice(2, 15)  # across both ranks' partitions
    assert torch.equal(tensors["layers.1.weight"][box], expected["layers.1.weight"][box])
    assert (found.step, found.optimizer_step, found.settings["zero_optimization"]["stage"]) == (3, 3, int(kind[4]))
    assert found.shared == {"output.weight": "embedding.weight"}
    assert [group.settings["weight_decay"] for group in found.groups] == [0.1, 0.0]
    assert found.groups[0].names[0] == "embedding.weight" and len(found.groups[1].names) == 5


def test_universal_checkpoints_are_the_zero_checkpoint_that_they_were_made_of(deepspeed_saved: Path) -> None:
    found, source = open_deepspeed(deepspeed_saved / "universal"), open_deepspeed(deepspeed_saved / "zero1")
    assert found.universal and not source.universal and found.optimizer_step == source.optimizer_step
    for one, other in ((found.tensors, source.tensors), (found.optimizer, source.optimizer)):
        assert set(one) == set(other) and all(torch.equal(one[name][()], other[name][()]) for name in one)


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_moments_agree_between_stages(deepspeed_saved: Path, kind: str) -> None:
    found, other = open_deepspeed(deepspeed_saved / kind), open_deepspeed(deepspeed_saved / "zero1")
    assert set(found.optimizer) == set(other.optimizer) and len(found.optimizer) == 2 * 9
    for name, tensor in found.optimizer.items():
        torch.testing.assert_close(tensor[()], other.optimizer[name][()], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["moe", "moe-ep1"])
def test_experts_have_the_numbers_of_all_ranks(deepspeed_saved: Path, kind: str) -> None:
    """Both the experts' own files and the optimizer's partitions have each expert."""
    found = open_deepspeed(deepspeed_saved / kind)
    folder = deepspeed_saved / kind / TAG
    for layer in range(2):
        for expert in range(4):
            own = torch.load(folder / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
            for name, tensor in own.items():
                assert torch.equal(found.tensors[name][()], tensor), name
                assert found.optimizer[f"exp_avg/{name}"].shape == tensor.shape
    assert len(found.tensors) == 5 + 2 * 4 * 4 and len(found.optimizer) == 2 * len(found.tensors)
    assert sorted(name for group in found.groups for name in group.names) == sorted(found.tensors)
    assert found.groups[1].settings["name"] == ("ep_size_2" if kind == "moe" else "ep_size_1")
    moments = {name: tensor[()] for name, tensor in found.optimizer.items() if ".0.weight" in name}
    assert len({tensor.sum().item() for tensor in moments.values()}) > len(moments) // 2  # each expert its own


def _change(path: Path, change: Callable[[dict], None]) -> None:
    content = torch.load(path, weights_only=False)  # of our own making
    change(content)
    torch.save(content, path)


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def _keep_less(content: dict) -> None:
    state = content["optimizer_state_dict"]
    state["param_slice_mappings"][0].popitem()


DAMAGES = {
    "code in the model": ("zero1", "mp_rank_00_model_states.pt", {"evil": _Evil()}, "asks for posix.system"),
    "code in the optimizer": ("zero1", "zero_pp_rank_1_mp_rank_00_optim_states.pt", {"evil": _Evil()}, "asks for posix"),
    "a rank's optimizer missing": ("zero2", "zero_pp_rank_0_mp_rank_00_optim_states.pt", None, "rank_0_.* is missing"),
    "the last rank's": ("zero3", "zero_pp_rank_1_mp_rank_00_optim_states.pt", None, "rank_1_.* is missing"),
    "an expert missing": ("moe", "layer_1_expert_2_mp_rank_00_model_states.pt", None, "layer_1_expert_2_.* is missing"),
    "the weights missing": ("zero1", "mp_rank_00_model_states.pt", None, "no mp_rank_00_model_states.pt"),
    "a part cut off": ("zero1", "zero_pp_rank_0_mp_rank_00_optim_states.pt", _keep_less, "missing or damaged"),
    "tensor parallelism": ("zero1", "mp_rank_00_model_states.pt", {"mp_world_size": 2}, "parallelism 2.*ds_to_universal"),
    "no model": ("zero1", "mp_rank_00_model_states.pt", lambda content: content.clear(), "not a checkpoint of DeepSpeed"),
    "no tensor": ("universal", "zero/norm.weight/fp32.pt", {"param": "text"}, "norm.weight/fp32.pt: has no tensor"),
    "a universal weight missing": ("universal", "zero/norm.weight/fp32.pt", None, "norm.weight/fp32.pt: is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_and_nothing_executed(
    deepspeed_saved: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind, file, change, message = DAMAGES[name]
    folder = copied(deepspeed_saved / kind, tmp_path)
    if change is None:
        (folder / TAG / file).unlink()
    else:
        _change(folder / TAG / file, change if callable(change) else lambda content: content.update(change))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_deepspeed(folder)
    assert str(folder) in str(caught.value)
    assert not Path("executed").exists()


def test_experts_twice_or_too_many_are_refused(deepspeed_saved: Path, tmp_path: Path) -> None:
    folder = copied(deepspeed_saved / "moe", tmp_path) / TAG
    one, two, more = (folder / f"layer_0_expert_{number}_mp_rank_00_model_states.pt" for number in (1, 2, 4))
    shutil.copy(one, more)
    with pytest.raises(CheckpointError, match="no such expert"):
        open_deepspeed(folder)
    more.unlink()
    shutil.copy(one, two)
    with pytest.raises(CheckpointError, match=r"expert_2_.*deepspeed_experts\.1\.0\.weight, which is not of expert 2"):
        open_deepspeed(folder)


def test_a_tag_that_leaves_the_folder_is_refused(deepspeed_saved: Path, tmp_path: Path) -> None:
    folder = copied(deepspeed_saved / "zero1", tmp_path)
    (folder / "latest").write_text(f"../{folder.name}/{TAG}")
    with pytest.raises(CheckpointError, match="is not a name"):
        open_deepspeed(folder)
    (folder / "latest").write_text("global_step9")
    with pytest.raises(CheckpointError, match="global_step9 does not exist"):
        open_deepspeed(folder)
