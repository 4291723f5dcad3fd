"""A checkpoint fits any layout: saved in one, training goes on in another as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_specialm.base.files import publish_folder
from megatron_specialm.base.tensors import save_tensors
from megatron_specialm.checkpoint.opening import newest_checkpoint, open_checkpoint
from megatron_specialm.checkpoint.steps import STATE, step_folder
from megatron_specialm.config.parallel import ParallelConfig
from tests.training import EPSILON, SHAPE, VOCABULARY, read_metrics, run_layout

ONE: dict = {}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
TP4 = {"tensor_parallel": 4}
PP2 = {"pipeline_parallel": 2}
PP4 = {"pipeline_parallel": 4}
VP2 = {"pipeline_parallel": 2, "virtual_pipeline": 2}
DP4 = {"data_parallel": 4}
DP2 = {"data_parallel": 2, "distributed_optimizer": True}
TP2_PP2 = {"tensor_parallel": 2, "pipeline_parallel": 2}
TP2_DP2 = {"tensor_parallel": 2, "data_parallel": 2, "distributed_optimizer": True}
PP2_DP2 = {"pipeline_parallel": 2, "data_parallel": 2, "distributed_optimizer": True}
PAIRS = [(ONE, TP2), (TP2, PP2), (DP2, TP2_PP2), (PP2_DP2, ONE)]
MORE_PAIRS = [(PP2, TP4), (TP2_PP2, DP2), (TP2_DP2, PP4), (PP4, TP2_DP2), (VP2, PP2_DP2), (TP4, VP2)]
SAVED, STEPS = 4, 26
SETTINGS = {
    "model": SHAPE.model_copy(update={"layers": 5}),  # no number of stages here divides it
    "steps": STEPS, "optimizer": {"learning_rate": 1e-3, "epsilon": EPSILON},
    "checkpoint": {"every": SAVED, "keep": 99},
}  # fmt: skip


def _losses(folder: Path, layout: dict, **settings) -> list[float]:
    parallel = ParallelConfig(**layout)
    micro_batches = max(2, parallel.pipeline_parallel)  # of each copy, of the 8 windows of a step
    size = {"micro_batch_size": 8 // (parallel.data_parallel * micro_batches)}
    run_layout(folder, **{**SETTINGS, **size, **settings}, parallel=layout)
    return [record["loss"] for record in read_metrics(folder) if "loss" in record and record["step"] > SAVED]


def _go_on(saved: Path, folder: Path, layout: dict, **settings) -> list[float]:
    """From the step that `saved` holds."""
    folder.mkdir()
    name = f"step_{SAVED:07d}"
    shutil.copytree(saved / name, folder / name)
    return _losses(folder, layout, **settings)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process that nothing interrupts."""
    return _losses(tmp_path_factory.mktemp("straight"), ONE)


@pytest.mark.parametrize(
    ("before", "after"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE_PAIRS)], ids=str
)
def test_training_goes_on_in_another_layout_with_the_same_loss(
    tmp_path: Path, straight: list[float], before: dict, after: dict
) -> None:
    _losses(tmp_path / "before", before, steps=SAVED)
    moved = _go_on(tmp_path / "before", tmp_path / "after", after)
    assert len(moved) == STEPS - SAVED >= 20
    assert moved == pytest.approx(straight, rel=1e-5)


def test_in_bf16_too(tmp_path: Path) -> None:
    straight = _losses(tmp_path / "straight", ONE, precision="bf16")
    _losses(tmp_path / "before", TP2_DP2, precision="bf16", steps=SAVED)
    moved = _go_on(tmp_path / "before", tmp_path / "after", PP2, precision="bf16")
    assert len(moved) == len(straight) == STEPS - SAVED
    assert moved == pytest.approx(straight, rel=3e-3)


def test_files_hold_whole_canonical_tensors_without_padding(tmp_path: Path) -> None:
    """Tied embeddings are there once, though two pipeline stages hold them, and padded differently under each TP."""
    found = {}
    for name, layout in {"one": ONE, "tp4": TP4, "pp4": PP4, "tp2dp2": TP2_DP2}.items():
        _losses(tmp_path / name, layout, steps=4)
        folder, _ = newest_checkpoint(tmp_path / name)
        assert folder is not None
        checkpoint = open_checkpoint(folder)
        found[name] = {key: tuple(checkpoint.weights[key].shape) for key in checkpoint.weights}
        assert set(checkpoint.optimizer_state) == {"step"} | {
            f"{moment}/{key}" for key in checkpoint.weights for moment in ("exp_avg", "exp_avg_sq")
        }
        files = json.loads((folder / "manifest.json").read_text())["files"]
        written = sum(name.startswith("model-") for name in files)
        assert written == {"one": 1, "tp4": 4, "pp4": 4, "tp2dp2": 4}[name]  # every process writes a share
    assert all(shapes == found["one"] for shapes in found.values())
    assert found["one"]["embedding.word_embeddings.weight"] == (VOCABULARY, SHAPE.hidden_size)
    assert "output_layer.weight" not in found["one"]


@pytest.mark.parametrize("layout", [ONE, TP2], ids=str)
def test_a_checkpoint_that_an_earlier_version_wrote_goes_on(tmp_path: Path, layout: dict) -> None:
    """Version 0.1 wrote it on two processes with the distributed optimizer, and went on with these losses."""
    shape = SHAPE.model_copy(update={"layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "attention_heads": 2})
    shutil.copytree(Path(__file__).parent / "earlier_checkpoint", tmp_path / "run")
    run_layout(tmp_path / "run", **{**SETTINGS, "model": shape, "steps": 6}, parallel=layout)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert losses == pytest.approx(
        [4.608128057462033, 4.606505349417713, 4.614542292452406, 4.601518652904993], rel=1e-5
    )


def test_whole_tensors_in_many_files_go_on_with_the_same_bits(tmp_path: Path) -> None:
    """As earlier versions wrote them: each tensor in the file of one process."""
    layout = DP2
    _losses(tmp_path / "straight", layout, steps=8)
    saved = step_folder(tmp_path / "straight", SAVED)
    sliced = open_checkpoint(saved)
    assert any("[" in key for path in saved.glob("*.safetensors") for key in load_file(path)), "else this tests nothing"
    earlier = tmp_path / "aside"
    earlier.mkdir()
    shutil.copy(saved / STATE, earlier)
    for part, tensors in (("model", sliced.weights), ("optimizer", sliced.optimizer_state)):
        for rank in range(2):
            dealt = {name: tensors[name] for name in sorted(tensors)[rank::2]}
            save_tensors(dealt, earlier / f"{part}-{rank:05d}.safetensors")
    (tmp_path / "resumed").mkdir()
    publish_folder(earlier, step_folder(tmp_path / "resumed", SAVED))
    _losses(tmp_path / "resumed", layout, steps=8)
    straight, resumed = (open_checkpoint(step_folder(tmp_path / name, 8)) for name in ("straight", "resumed"))
    for one, other in ((straight.weights, resumed.weights), (straight.optimizer_state, resumed.optimizer_state)):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", [DP4, TP2_DP2], ids=str)
def test_every_process_writes_an_equal_part(tmp_path: Path, layout: dict) -> None:
    _losses(tmp_path, layout, steps=SAVED)
    sizes = [
        sum(
            tensor.numel()
            for part in ("model", "optimizer")
            for tensor in load_file(step / f"{part}-0000{rank}.safetensors").values()
        )
        for step in [step_folder(tmp_path, SAVED)]
        for rank in range(4)
    ]
    assert max(sizes) <= 1.1 * min(sizes)


def test_a_missing_shard_is_passed_over_for_the_step_before(tmp_path: Path) -> None:
    straight = _losses(tmp_path, TP2_PP2, steps=8)
    (tmp_path / "step_0000008" / "model-00002.safetensors").unlink()
    (tmp_path / "result.json").unlink()
    (tmp_path / "metrics.jsonl").unlink()
    assert _losses(tmp_path, TP2_PP2, steps=8) == pytest.approx(straight, rel=1e-6)
    said = (tmp_path / "log-0").read_text()
    assert "skipped unusable step_0000008" in said and "model-00002.safetensors: missing" in said
