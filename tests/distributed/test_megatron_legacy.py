"""Megatron-LM's older checkpoints, a file per rank: real ones, and files as other layouts arrange them."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.convert.megatron_legacy import open_megatron_legacy, recognize
from tests.conftest import copied

slow = pytest.mark.slow  # megatron-core saves first, on four processes
ITERATION = "iter_0000003"
# Of the local layer spec, which has norms of their own, in the names of torch_dist, which are Transformer Engine's.
_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@slow
def test_what_real_modules_saved_at_tp2_pp2_is_read(megatron_saved: Path) -> None:
    assert recognize(megatron_saved / "legacy") and not recognize(megatron_saved / "stacked")
    found = open_megatron_legacy(megatron_saved / "legacy")
    assert (found.step, found.version, found.copies, len(found.shards)) == (3, 3.0, [], 2)
    assert found.settings["num_layers"] == 4
    truth = load_file(megatron_saved / "truth.safetensors")
    names = set(found.shards[0])
    for key, whole in truth.items():
        if key.startswith("optimizer."):
            continue
        for layer, expected in enumerate(whole) if ".layers." in key else [(0, whole)]:
            name = key.replace(".layers.", f".layers.{layer}.")
            for theirs, ours in _NORMS.items():
                name = name.replace(theirs, ours)
            names.remove(name)
            parts = [shard[name][()] for shard in found.shards]
            if parts[0].shape == expected.shape:
                assert all(torch.equal(part, expected) for part in parts), name
            elif "linear_fc1" in name:  # each rank has its part of the gate, then its part of up
                gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
                assert torch.equal(torch.cat([*gates, *ups]), expected), name
            else:
                cut = next(axis for axis, size in enumerate(parts[0].shape) if size != expected.shape[axis])
                assert torch.equal(torch.cat(parts, cut), expected), name
    assert not names


def _write(folder: Path, rank: str, *, chunks: dict | None = None, **sizes: int) -> None:
    content = {"checkpoint_version": 2.0, "iteration": 7, "args": argparse.Namespace(**sizes), **(chunks or {})}
    place = folder / "iter_0000007" / rank
    place.mkdir(parents=True)
    torch.save(content, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")


def test_interleaved_pipelines_count_layers_over_chunks_and_stages(tmp_path: Path) -> None:
    """Chunk c of stage s has the layers after those of chunk c of the stages before."""
    for stage in range(2):
        chunks = {
            f"model{chunk}": {
                f"decoder.layers.{local}.x": torch.tensor(4 * chunk + 2 * stage + local) for local in range(2)
            }
            for chunk in range(2)
        }
        _write(tmp_path, f"mp_rank_00_{stage:03d}", chunks=chunks, pipeline_model_parallel_size=2)
    (shard,) = open_megatron_legacy(tmp_path).shards
    assert {name: int(tensor[()]) for name, tensor in shard.items()} == {f"decoder.layers.{n}.x": n for n in range(8)}


@pytest.mark.parametrize("stages", [1, 2])
def test_experts_are_counted_over_ranks(tmp_path: Path, stages: int) -> None:
    for stage in range(stages):
        for rank in range(2):
            model: dict = {"decoder.layers.0.router": torch.tensor(-1)}
            for local in range(2):
                number = torch.tensor(2 * rank + local + 10 * stage)
                model[f"decoder.layers.0.mlp.experts.local_experts.{local}.linear_fc1.weight"] = number
                model[f"decoder.layers.0.mlp.experts.linear_fc2.weight{local}"] = number
            sizes = {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": stages}
            name = f"mp_rank_00_{stage:03d}_{rank:03d}" if stages > 1 else f"mp_rank_00_{rank:03d}"
            _write(tmp_path, name, chunks={"model": model}, **sizes)
    found = open_megatron_legacy(tmp_path)
    assert found.copies == []
    (shard,) = found.shards
    for layer in range(stages):
        for expert in range(4):
            expected = expert + 10 * layer
            prefix = f"decoder.layers.{layer}.mlp.experts"
            assert int(shard[f"{prefix}.local_experts.{expert}.linear_fc1.weight"][()]) == expected
            assert int(shard[f"{prefix}.linear_fc2.weight{expert}"][()]) == expected
    assert len(shard) == stages * 9


def test_older_names_are_joined_and_copies_listed(tmp_path: Path) -> None:
    nested = {"language_model": {"encoder": {"layers.0.input_layernorm.weight": torch.ones(2)}, "output_layer": None}}
    both = {"language_model": {"embedding": {"word_embeddings": {"weight": torch.zeros(1)}}}}
    for stage in range(2):
        _write(
            tmp_path,
            f"mp_rank_00_{stage:03d}",
            chunks={"model": {**nested, "own": both}},
            pipeline_model_parallel_size=2,
        )
    found = open_megatron_legacy(tmp_path)
    assert set(found.shards[0]) == {
        "language_model.encoder.layers.0.input_layernorm.weight", "language_model.encoder.layers.1.input_layernorm.weight",
        "own.language_model.embedding.word_embeddings.weight",
    }  # fmt: skip
    assert found.copies == ["own.language_model.embedding.word_embeddings.weight"]
    assert found.version == 2.0


class _Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


@slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "mp_rank_01_000/model_optim_rng.pt").unlink(),
            "mp_rank_01_000/model_optim_rng.pt: no such file",
        ),
        (
            lambda f: torch.save({"model": {}}, f / "mp_rank_01_001/model_optim_rng.pt"),
            "ranks 0 and 1 do not both have",
        ),
        (lambda f: torch.save({"weights": {}}, f / "mp_rank_00_000/model_optim_rng.pt"), "it has no model"),
        (lambda f: torch.save({"model": _Evil()}, f / "mp_rank_00_001/model_optim_rng.pt"), "asks for posix.system"),
        (lambda f: os.truncate(f / "mp_rank_00_001/model_optim_rng.pt", 5000), "not a file of torch.save"),
    ],
)
def test_damage_is_refused_and_nothing_executed(
    megatron_saved: Path, tmp_path: Path, damage, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(megatron_saved / "legacy", tmp_path)
    damage(folder / ITERATION)
    with pytest.raises(CheckpointError, match=message):
        open_megatron_legacy(folder)
    assert not Path("executed").exists()


@slow
def test_real_experts_of_pp2_ep2_are_counted_over_ranks(megatron_saved: Path) -> None:
    whole = load_file(megatron_saved / "truth-moe.safetensors")
    (shard,) = open_megatron_legacy(megatron_saved / "moe-legacy").shards
    for layer in range(4):
        assert torch.equal(
            shard[f"decoder.layers.{layer}.mlp.router.weight"][()], whole["decoder.layers.mlp.router.weight"][layer]
        )
        for expert in range(4):
            for linear in ("linear_fc1.weight", "linear_fc2.weight"):
                own = shard[f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{linear}"]
                assert torch.equal(own[()], whole[f"decoder.layers.mlp.experts.experts.{linear}"][layer, expert])
