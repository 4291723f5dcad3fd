"""The same function everywhere: with fused kernels and without, on a GPU and a CPU, in training and in the export."""

from pathlib import Path

import pytest
import torch

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.model import gpt
from megatron_specialm.model.gpt import Gpt
from tests.logits import (
    CONTEXT,
    NEOX,
    SHAPES,
    TOLERANCES,
    VOCABULARY,
    difference,
    logits,
    logits_of_export,
    logits_on_cpu,
    trained,
)

every_function = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch):
    """A function that has models built as on a GPU from then on. Megatron-Core's kernels run as they are written, without
    a compiler."""

    def fuse() -> None:
        monkeypatch.setattr(gpt, "has_kernels", lambda: True)

    with torch.compiler.set_stance("force_eager"):
        yield fuse


@every_function
@pytest.mark.usefixtures("alone")
def test_fused_kernels_compute_what_the_export_does(shape: ModelConfig, fused, tmp_path: Path) -> None:
    weights = trained(shape)
    plain = logits(shape, weights, "fp32")
    exported = logits_of_export(shape, weights, tmp_path)
    fused()
    settings = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT).chunks[0].config
    assert settings.bias_dropout_fusion and settings.bias_activation_fusion == (shape != SHAPES["gelu"])
    ours = logits(shape, weights, "fp32")
    assert difference(ours, plain, "fp32") < TOLERANCES["fp32"]
    assert difference(ours, exported, "fp32") < TOLERANCES["fp32"]


@every_function
@pytest.mark.usefixtures("alone")
def test_fused_kernels_train_the_same_weights(shape: ModelConfig, fused) -> None:
    plain = trained(shape, steps=5)
    fused()
    for name, weight in trained(shape, steps=5).items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.usefixtures("alone")
def test_the_two_gelus_are_told_apart() -> None:
    """The comparisons above would see one taken for the other."""
    weights = trained(NEOX)
    exact, approximate = (logits(SHAPES[name], weights, "fp32") for name in ("gelu", "gelu_tanh"))
    assert difference(approximate, exact, "fp32") > 5 * TOLERANCES["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@every_function
@pytest.mark.usefixtures("alone")
def test_a_cpu_and_the_export_agree(shape: ModelConfig, precision: gpt.Precision, tmp_path: Path) -> None:
    """`tests/gpu` compares a GPU with both; here its lines run where there is none."""
    weights = trained(shape)
    ours = logits(shape, weights, precision)
    assert difference(ours, logits_of_export(shape, weights, tmp_path), precision) < TOLERANCES[precision]


@pytest.mark.usefixtures("alone")
def test_a_process_without_gpus_agrees(tmp_path: Path) -> None:
    weights = trained(SHAPES["gelu_tanh"], steps=5)
    ours, theirs = (
        read(SHAPES["gelu_tanh"], weights, "fp32", *folder)
        for read, folder in ((logits, ()), (logits_on_cpu, (tmp_path,)))
    )
    assert difference(ours, theirs, "fp32") < TOLERANCES["fp32"]


def test_a_description_names_the_activation() -> None:
    """That of a checkpoint is the model's settings; models from before the setting are read as what they are."""
    assert NEOX.model_dump(mode="json")["activation"] == "gelu"
    described = SHAPES["gelu_tanh"].model_dump(mode="json")
    assert described["activation"] == "gelu_tanh" and ModelConfig(**described) == SHAPES["gelu_tanh"]
    llama = NEOX.model_copy(update={"family": "llama"})
    assert "activation" not in llama.model_dump(mode="json"), "its own is SwiGLU"
    before = {name: value for name, value in NEOX.model_dump().items() if name != "activation"}
    assert ModelConfig(**before) == NEOX
    with pytest.raises(ValueError, match="activation gelu_tanh is for family neox; llama's is SwiGLU: leave it out"):
        ModelConfig(**{**described, "family": "llama"})
