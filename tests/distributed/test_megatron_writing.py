"""What is written for Megatron is loaded by megatron-core, at TP2 x PP2."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_specialm.convert.megatron_legacy import open_megatron_legacy
from megatron_specialm.convert.megatron_legacy_writing import write_megatron_legacy
from megatron_specialm.convert.torch_dist import open_torch_dist
from megatron_specialm.convert.torch_dist_writing import write_torch_dist
from tests.conftest import run_peer

STEP = 3


@pytest.mark.slow
def test_megatron_core_loads_what_was_written(
    megatron_saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files of parts that no rank has, every rank finds its own."""
    monkeypatch.setattr("megatron_specialm.convert.torch_zip_writing.SLICE_BYTES", 5000)
    source = open_torch_dist(megatron_saved / "stacked")
    common = {**source.common, "args": argparse.Namespace(**source.settings)}
    write_torch_dist(
        tmp_path / "written",
        source.tensors,
        step=STEP,
        common=common,
        optimizer=source.optimizer,
        objects=source.objects,
    )
    again = open_torch_dist(tmp_path / "written")
    assert (again.step, again.settings, set(again.objects)) == (STEP, source.settings, set(source.objects))
    for one, other in ((again.tensors, source.tensors), (again.optimizer, source.optimizer)):
        assert set(one) == set(other) and all(torch.equal(one[name][()], other[name][()]) for name in one)
    legacy = open_megatron_legacy(megatron_saved / "legacy")
    write_megatron_legacy(
        tmp_path / "written-legacy", legacy.shards, settings=legacy.settings, step=STEP, stage_layers=[2, 2]
    )
    run_peer("megatron", "load", tmp_path)
    truth = load_file(megatron_saved / "truth.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    assert set(plain) == set(truth) and all(torch.equal(plain[name], truth[name]) for name in truth)
    for tensor in range(2):
        for stage in range(2):
            rank = megatron_saved / "legacy" / f"iter_{STEP:07d}" / f"mp_rank_{tensor:02d}_{stage:03d}"
            own = torch.load(rank / "model_optim_rng.pt", weights_only=False)["model"]
            moments = torch.load(tmp_path / f"optimizer-{tensor}-{stage}.pt", weights_only=False)["state"]
            expected = torch.load(rank / "model_optim_rng.pt", weights_only=False)["optimizer"]["state"]
            assert set(moments) == set(expected) and len(moments) > 10
            for parameter, state in expected.items():
                assert all(
                    torch.equal(moments[parameter][name], state[name]) for name in ("exp_avg", "exp_avg_sq", "step")
                )
            for form in ("loaded", "loaded-legacy"):
                loaded = load_file(tmp_path / f"{form}-{tensor}-{stage}.safetensors")
                assert {name for name, one in own.items() if one is not None} == set(loaded)
                assert all(torch.equal(loaded[name], own[name]) for name in loaded)


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_experts_and_layers_are_dealt_out_and_found_again(tmp_path: Path, expert_parallel: int) -> None:
    names = [
        "embedding.word_embeddings.weight", "output_layer.weight",
        *(f"decoder.layers.{layer}.mlp.experts.local_experts.{e}.linear_fc1.weight" for layer in range(3) for e in range(4)),
        *(f"decoder.layers.{layer}.mlp.experts.linear_fc2.weight{expert}" for layer in range(3) for expert in range(4)),
        *(f"decoder.layers.{layer}.mlp.router.weight" for layer in range(3)),
    ]  # fmt: skip
    shards = [{name: torch.tensor([rank * 100 + number]) for number, name in enumerate(names)} for rank in range(2)]
    write_megatron_legacy(
        tmp_path, shards, settings={}, step=None, stage_layers=[1, 2], expert_parallel=expert_parallel
    )
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert len(list((tmp_path / "release").iterdir())) == 2 * 2 * expert_parallel
    found = open_megatron_legacy(tmp_path)
    assert found.copies == []
    for own, expected in zip(found.shards, shards, strict=True):
        assert {name: int(one[()]) for name, one in own.items()} == {name: int(one) for name, one in expected.items()}
