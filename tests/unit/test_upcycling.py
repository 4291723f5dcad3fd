"""An MoE that is made of dense models starts as what it is made of."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.upcycling import upcycled
from megatron_specialm.model.weights import weight_specs
from tests.checkpoints import assert_same_logits

VOCABULARY, CONTEXT = 100, 16
DENSE = ModelConfig(layers=4, hidden_size=32, ffn_hidden_size=48, attention_heads=4)
LLAMA = DENSE.model_copy(update={"family": "llama", "query_groups": 2})
MODELS = {
    "top-2": MixtureOfExperts(experts=4),
    "top-3, every second layer": MixtureOfExperts(experts=6, top_k=3, every=2),
    "pyramid": MixtureOfExperts(experts=[2, 2, 4, 8]),
    "one expert": MixtureOfExperts(experts=1, top_k=1),
    "sigmoid": MixtureOfExperts(experts=4, bias_update_rate=0.01, aux_loss=0),
}
Weights = dict[str, torch.Tensor]


def _drawn(shape: ModelConfig, seed: int) -> Weights:
    """Weights, biases and norms all random and large."""
    generator = torch.Generator().manual_seed(seed)
    specs = weight_specs(shape, vocabulary_size=VOCABULARY)
    return {name: torch.randn(spec.shape, generator=generator) * 0.3 for name, spec in specs.items()}


def _made(models: list[Weights], shape: ModelConfig) -> dict[str, Any]:
    return upcycled(models, shape, vocabulary_size=VOCABULARY, seed=0)


@torch.no_grad()
def _logits(shape: ModelConfig, weights: dict[str, Any]) -> torch.Tensor:
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (3, CONTEXT)))
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT).train(False)
    model.load(weights)
    return model.logits(tokens)


@pytest.mark.parametrize("moe", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("dense", [DENSE, LLAMA], ids=["neox", "llama"])
@pytest.mark.usefixtures("alone")
def test_an_moe_of_one_dense_model_starts_as_the_same_function(dense: ModelConfig, moe: MixtureOfExperts) -> None:
    weights = _drawn(dense, 0)
    shape = dense.model_copy(update={"moe": moe})
    expected = _logits(dense, weights)
    found = _logits(shape, _made([weights], shape))
    assert_same_logits(found, expected)


@pytest.mark.parametrize("dense", [DENSE, LLAMA], ids=["neox", "llama"])
@pytest.mark.usefixtures("alone")
def test_a_shared_expert_alone_and_a_residual_part_reduce_to_the_dense_model(dense: ModelConfig) -> None:
    """A gate of zeros halves the shared expert; a mix of zeros takes half of each part."""
    weights = _drawn(dense, 0)
    expected = _logits(dense, weights)
    shared = dense.model_copy(update={"moe": MixtureOfExperts(experts=4, shared_expert=dense.ffn_hidden_size)})
    residual = dense.model_copy(update={"moe": MixtureOfExperts(experts=4, residual=True)})
    for shape, part, silent, factor in ((shared, "shared_expert", "experts", 2), (residual, "residual", None, 1)):
        made = _made([weights], dense.model_copy(update={"moe": MixtureOfExperts(experts=4)}))
        for name, spec in weight_specs(shape, vocabulary_size=VOCABULARY).items():
            if f".mlp.{part}." in name:
                output = factor if "linear_fc2" in name else 1
                made[name] = weights[name.replace(f"mlp.{part}", "mlp")] * output
            elif f".mlp.{part}" in name or (silent and f".mlp.{silent}." in name):
                made[name] = torch.zeros(spec.shape)
        assert_same_logits(_logits(shape, made), expected, part)


@pytest.mark.usefixtures("alone")
def test_an_moe_of_equal_models_is_any_of_them() -> None:
    """Branch-Train-MiX of copies of one model is sparse upcycling."""
    weights, shape = _drawn(LLAMA, 0), LLAMA.model_copy(update={"moe": MixtureOfExperts(experts=4)})
    assert torch.equal(_logits(shape, _made([weights] * 4, shape)), _logits(shape, _made([weights], shape)))


def test_of_several_models_feed_forward_parts_are_experts_and_all_else_is_averaged() -> None:
    models = [_drawn(DENSE, seed) for seed in range(3)]
    shape = DENSE.model_copy(update={"moe": MixtureOfExperts(experts=6, every=2)})
    made = _made(models, shape)
    layer = "decoder.layers.1.mlp"
    for part in ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias"):
        for expert in range(6):
            assert torch.equal(made[f"{layer}.experts.{part}"][()][expert], models[expert % 3][f"{layer}.{part}"])
    for name in ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.1.self_attention.linear_proj.weight"):
        mean = torch.stack([model[name] for model in models]).mean(0)
        assert torch.allclose(made[name][()], mean, atol=1e-7)
    router = made[f"{layer}.router.weight"][()]
    assert router.shape == (6, 32) and len({float(value) for value in router.flatten()}) == router.numel()


def test_slices_are_those_of_the_whole() -> None:
    models = [_drawn(LLAMA, seed) for seed in range(2)]
    made = _made(models, LLAMA.model_copy(update={"moe": MixtureOfExperts(experts=4)}))
    box = {1: (slice(2, 7),), 2: (slice(2, 7), slice(0, 9)), 3: (slice(1, 3), slice(5, 20), slice(0, 9))}
    for name, weight in made.items():
        assert weight.shape == weight[()].shape, name
        index = box[len(weight.shape)]
        assert torch.equal(weight[index], weight[()][index]), name
