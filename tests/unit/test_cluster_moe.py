"""An MoE that routes by cluster, by what it reduces to: a projected network whose experts share no matrix, and plain models."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_specialm.base.errors import TrainingError
from megatron_specialm.checkpoint.slices import parse_key
from megatron_specialm.config.model import ModelConfig, Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.estimate.flops import forward_flops, training_flops
from megatron_specialm.estimate.parameters import count_parameters, count_trained_parameters
from megatron_specialm.model.gpt import Gpt, forward
from megatron_specialm.model.initial import first_weight
from megatron_specialm.model.merge import project, take_expert
from megatron_specialm.model.weights import EXPERT_CODES, EXPERTS, PROJECTION

VOCABULARY, CONTEXT, COUNT = 100, 16, 3

pytestmark = pytest.mark.usefixtures("alone")
Weights = dict[str, torch.Tensor]


@pytest.fixture(params=["neox", "llama"])
def shape(request: pytest.FixtureRequest) -> ModelConfig:
    """The plain shape of a family."""
    return request.getfixturevalue(request.param)


def _projected(shape: ModelConfig) -> ModelConfig:
    return shape.model_copy(update={"projection": Projection(experts=COUNT, capacity=COUNT, code_size=COUNT)})


def _routed(shape: ModelConfig, **moe) -> ModelConfig:
    return shape.model_copy(update={"moe": MixtureOfExperts(experts=COUNT, route="cluster", **moe)})


def _one_hot_network(shape: ModelConfig) -> Weights:
    """Weights of a projected network with one-hot codes and the identity as projection: an expert's matrices are its own."""
    model = Gpt(_projected(shape), vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.initialize(seed=7)
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, parameter, spec in model.weights():
        value = parameter.detach()[: spec.shape[0]]
        is_identity = name == EXPERT_CODES or name.endswith(PROJECTION)
        weights[name] = (
            torch.eye(COUNT) if is_identity else value + 0.05 * torch.randn(value.shape, generator=generator)
        )
    return weights


def _as_moe(network: Weights) -> Weights:
    """The canonical weights of the same function as an MoE; the network's other ones are left out."""
    return {
        name.replace("mlp", EXPERTS).removesuffix("_basis") if name.endswith("_basis") else name: value
        for name, value in network.items()
        if name != EXPERT_CODES and not name.endswith(PROJECTION)
    }


def _engine(shape: ModelConfig, weights: Weights, *, micro_batch_size: int, recompute: str = "none") -> MegatronEngine:
    parallel = ParallelConfig(recompute=recompute)
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, parallel=parallel)
    model.load(weights)
    return MegatronEngine(
        model, parallel=parallel, optimizer=Optimizer(clip_grad=1e6), micro_batch_size=micro_batch_size
    )


def _whole(slices: Weights) -> Weights:
    """Tensors from the slices of a process that has all of them, in order."""
    found: dict[str, list[torch.Tensor]] = {}
    for key, value in slices.items():
        found.setdefault(parse_key(Path(), key, value.shape)[0], []).append(value)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _batch() -> Batch:
    """Windows of uneven length, four of each expert in turn."""
    generator = np.random.default_rng(0)
    windows = generator.integers(0, VOCABULARY, (4 * COUNT, CONTEXT + 1))
    mask = (np.arange(CONTEXT) < generator.integers(1, CONTEXT + 1, 4 * COUNT)[:, None]).astype(np.float32)
    return Batch(
        windows[:, :-1].copy(), windows[:, 1:].copy(), mask, {MIXTURE: np.eye(COUNT, dtype=np.float32).repeat(4, 0)}
    )


def _shuffled(batch: Batch) -> Batch:
    order = np.random.default_rng(1).permutation(len(batch.tokens))
    parts = (batch.tokens[order], batch.targets[order], batch.mask[order])
    return Batch(*parts, {MIXTURE: batch.extra_inputs[MIXTURE][order]})


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_it_trains_as_a_projected_network_with_one_hot_codes(shape: ModelConfig, recompute: str) -> None:
    """Loss and gradients are equal, although its micro-batches have windows of several experts."""
    weights, batch = _one_hot_network(shape), _batch()
    network = _engine(_projected(shape), weights, micro_batch_size=4)
    moe = _engine(_routed(shape), _as_moe(weights), micro_batch_size=6, recompute=recompute)
    expected, found = network.accumulate_gradients(batch), moe.accumulate_gradients(_shuffled(batch))
    assert found.total == pytest.approx(expected.total, rel=1e-6) and found.tokens == expected.tokens
    gradients = _whole(moe.gradients())
    for name, gradient in _as_moe(network.gradients()).items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradients.pop(name), gradient, rtol=0, atol=2e-5 * scale, msg=name)
    assert not gradients and not moe.gate_statistics()
    held_out = network.evaluate([batch])
    assert moe.evaluate([_shuffled(batch)]).mean == pytest.approx(held_out.mean, rel=1e-6)


def test_a_windows_logits_are_those_of_its_expert_alone(shape: ModelConfig) -> None:
    weights, batch, config = _one_hot_network(shape), _batch(), _routed(shape)
    model = Gpt(config, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.load(_as_moe(weights))
    tokens = torch.from_numpy(batch.tokens)
    experts = torch.from_numpy(batch.extra_inputs[MIXTURE] == 1)[:, None].expand(-1, CONTEXT, -1)
    logits = forward(model.chunks[0], tokens, experts).transpose(0, 1)
    for number, one_hot in enumerate(torch.eye(COUNT)):
        own = take_expert(_as_moe(weights), config, one_hot)
        expected = project(weights, _projected(shape), one_hot)
        assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
        plain = Gpt(config.base_config, vocabulary_size=VOCABULARY, context_length=CONTEXT)
        plain.load(own)
        rows = slice(4 * number, 4 * number + 4)
        torch.testing.assert_close(logits[rows], plain.logits(tokens[rows]), rtol=1e-5, atol=1e-5)


def test_it_costs_as_much_as_the_plain_model_and_holds_all_experts(shape: ModelConfig) -> None:
    config = _routed(shape)
    assert config.base_config == shape and config.window_experts == COUNT
    for flops in (forward_flops, training_flops):
        assert flops(config, VOCABULARY, CONTEXT) == flops(shape, VOCABULARY, CONTEXT)
    model = Gpt(config, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    held = sum(math.prod(spec.shape) for spec in model.specs.values())
    assert count_trained_parameters(config, VOCABULARY) == count_parameters(config, VOCABULARY) == held
    assert not any("router" in name for name in model.specs)


def test_every_layer_but_some_may_be_shared(shape: ModelConfig) -> None:
    """Of two layers the second has experts; a selected expert has the shape of the plain model."""
    config = _routed(shape, every=2)
    specs = Gpt(config, vocabulary_size=VOCABULARY, context_length=CONTEXT).specs
    weights = {name: first_weight(name, spec, config, seed=0)[...] for name, spec in specs.items()}
    plain = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    plain.load(take_expert(weights, config, torch.eye(COUNT)[1]))


def test_a_window_without_an_expert_is_refused_and_padding_needs_none(neox: ModelConfig) -> None:
    batch, moe = _batch(), _engine(_routed(neox), _as_moe(_one_hot_network(neox)), micro_batch_size=5)
    assert moe.evaluate([batch]).tokens == batch.mask.sum()  # three rows of padding
    for mixtures in ({}, {MIXTURE: np.full((len(batch.tokens), COUNT), 1 / COUNT, np.float32)}):
        with pytest.raises(TrainingError, match="a window comes without its expert"):
            moe.evaluate([batch._replace(extra_inputs=mixtures)])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("top_k", 2), ("aux_loss", 0.1), ("z_loss", 0.1), ("capacity_factor", 1.5), ("min_capacity", 8),
        ("bias_update_rate", 0.1), ("shared_expert", 8), ("residual", True), ("ffn_hidden_size", 8),
    ],
)  # fmt: skip
def test_what_means_nothing_without_a_router_is_refused(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{setting} {value} means nothing with route: cluster"):
        MixtureOfExperts(experts=4, route="cluster", **{setting: value})


def test_its_settings_survive_being_written(neox: ModelConfig) -> None:
    moe = _routed(neox).moe
    assert moe is not None and MixtureOfExperts(**moe.model_dump()) == moe and moe.top_k == 1 and not moe.aux_loss
    assert not moe.depends_on_micro_batch
    with pytest.raises(ValueError, match="give one number"):
        MixtureOfExperts(experts=[2, 4], route="cluster")
