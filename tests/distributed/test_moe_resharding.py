"""A checkpoint of an MoE model fits any layout, and each expert must be in it once."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_specialm.base.errors import CheckpointError
from megatron_specialm.base.tensors import save_tensors
from megatron_specialm.checkpoint.steps import step_folder
from megatron_specialm.checkpoint.tensor_files import TensorFiles
from megatron_specialm.config.moe import MixtureOfExperts
from tests.training import EPSILON, SHAPE, read_metrics, run_layout

ONE: dict = {}
EP2 = {"data_parallel": 2, "expert_parallel": 2}
EP4 = {"data_parallel": 4, "expert_parallel": 4, "distributed_optimizer": True}
EP2_DP4 = {"data_parallel": 4, "expert_parallel": 2, "distributed_optimizer": True}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
TP2_EP2 = {**TP2, **EP2}
PP2_EP2 = {"pipeline_parallel": 2, **EP2, "distributed_optimizer": True}
PAIRS = [(ONE, EP4), (EP4, TP2), (TP2_EP2, PP2_EP2), (PP2_EP2, EP2_DP4), (EP2_DP4, TP2_EP2), (EP2, ONE)]
SAVED, STEPS = 4, 16
MOE = MixtureOfExperts(experts=4, ffn_hidden_size=32, shared_expert=32, z_loss=0.001, bias_update_rate=0.001)
SETTINGS = {
    "model": SHAPE.model_copy(update={"family": "llama", "layers": 3, "moe": MOE}),
    "steps": STEPS, "optimizer": {"learning_rate": 1e-3, "epsilon": EPSILON},
    "micro_batch_size": 2, "checkpoint": {"every": SAVED, "keep": 99},
}  # fmt: skip


def _records(folder: Path, layout: dict, **settings) -> list[dict]:
    run_layout(folder, **{**SETTINGS, **settings}, parallel=layout)
    return [record for record in read_metrics(folder) if "loss" in record and record["step"] > SAVED]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_training_goes_on_in_another_layout_with_the_same_losses(tmp_path: Path, before: dict, after: dict) -> None:
    straight = _records(tmp_path / "before", before)
    (tmp_path / "after").mkdir()
    name = step_folder(tmp_path, SAVED).name
    shutil.copytree(tmp_path / "before" / name, tmp_path / "after" / name)
    moved = _records(tmp_path / "after", after)
    assert len(moved) == STEPS - SAVED
    for field in ("loss", "gradient_norm"):
        assert [one[field] for one in moved] == pytest.approx([one[field] for one in straight], rel=1e-4)
    gates = [[gate["aux_loss"] for one in records for gate in one["gates"]] for records in (straight, moved)]
    assert gates[1] == pytest.approx(gates[0], rel=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two processes with half of the experts each."""
    folder = tmp_path_factory.mktemp("moe")
    run_layout(folder, **{**SETTINGS, "steps": SAVED}, parallel=EP2)
    return step_folder(folder, SAVED)


def _model_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_each_process_writes_its_experts(saved: Path) -> None:
    held = [
        {key for key in load_file(path) if "layers.0.mlp.experts.linear_fc1" in key} for path in _model_files(saved)
    ]
    assert held == [
        {f"decoder.layers.0.mlp.experts.linear_fc1.weight[{expert}:{expert + 1}/4,0:64/64,0:32/32]" for expert in own}
        for own in ((0, 1), (2, 3))
    ]


def test_a_missing_expert_is_refused(saved: Path, tmp_path: Path) -> None:
    for path in _model_files(saved):
        tensors = load_file(path)
        save_tensors(
            {key: tensor for key, tensor in tensors.items() if "fc1.weight[2:3" not in key}, tmp_path / path.name
        )
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.linear_fc1\.weight have 6144 of its 8192.*index 2"):
        TensorFiles(_model_files(tmp_path))


def test_an_expert_twice_is_refused(saved: Path, tmp_path: Path) -> None:
    for path in _model_files(saved):
        tensors = load_file(path)
        renamed = {key.replace("weight[2:3/4", "weight[1:2/4"): tensor for key, tensor in tensors.items()}
        save_tensors(renamed, tmp_path / path.name)
    with pytest.raises(
        CheckpointError, match=r"experts\.linear_fc1\.weight\[1:2/4.*, which .*model-00000.safetensors has too"
    ):
        TensorFiles(_model_files(tmp_path))


def test_records_have_the_gates_of_each_layer(saved: Path) -> None:
    records = [json.loads(line) for line in (saved.parent / "metrics.jsonl").read_text().splitlines()]
    gates = next(record["gates"] for record in records if "loss" in record)
    assert [gate["layer"] for gate in gates] == [0, 1, 2]
    assert all(gate["load_min"] <= 1 <= gate["load_max"] and gate["dropped"] == 0 for gate in gates)
    assert all(0 < gate["entropy"] <= 1.39 and gate["aux_loss"] > 0.9 for gate in gates)  # ln 4 and even
