"""MoE layers on one process, against their formulas written out."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import Batch
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.protocol import GateStatistics, LossSum
from megatron_specialm.estimate.parameters import count_parameters
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.initial import first_weight
from megatron_specialm.model.moe import moe_layers
from megatron_specialm.model.router import Router
from megatron_specialm.train.gates import GateRecords

VOCABULARY, CONTEXT = 100, 16
SHAPE = ModelConfig(layers=2, hidden_size=32, ffn_hidden_size=48, attention_heads=4)

pytestmark = pytest.mark.usefixtures("alone")


def _shape(family: str = "llama", **moe) -> ModelConfig:
    return SHAPE.model_copy(update={"family": family, "moe": MixtureOfExperts(**{"experts": 4, **moe})})


def _values(shape: ModelConfig) -> dict[str, torch.Tensor]:
    """Canonical weights, of which no bias is zero and routers are decided."""
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    values = {name: first_weight(name, spec, shape, seed=0)[...] for name, spec in model.specs.items()}
    generator = torch.Generator().manual_seed(1)
    for name, value in values.items():
        if not value.any() or "router" in name:
            values[name] = torch.randn(value.shape, generator=generator) * 0.3
    return values


def _model(shape: ModelConfig, values: dict[str, torch.Tensor] | None = None) -> Gpt:
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.load(_values(shape) if values is None else values)
    return model


def _engine(shape: ModelConfig, **settings) -> MegatronEngine:
    return MegatronEngine(_model(shape), parallel=ParallelConfig(), optimizer=Optimizer(**settings), micro_batch_size=4)


def _batch(rows: int = 8) -> Batch:
    generator = np.random.default_rng(0)
    windows = generator.integers(0, VOCABULARY, (rows, CONTEXT + 1))
    lengths = generator.integers(1, CONTEXT + 1, rows)
    mask = (np.arange(CONTEXT) < lengths[:, None]).astype(np.float32)
    return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), mask)


def _network(
    values: dict[str, torch.Tensor], name: str, hidden_NH: torch.Tensor, family: str, expert: int | None = None
) -> torch.Tensor:
    """A feed-forward network, from its canonical weights."""

    def part(linear: str) -> list[torch.Tensor]:
        found = [values.get(f"{name}.{linear}.{kind}") for kind in ("weight", "bias")]
        return [tensor if expert is None else tensor[expert] for tensor in found if tensor is not None]

    inner = functional.linear(hidden_NH, *part("linear_fc1"))
    if family == "llama":
        gate, up = inner.chunk(2, dim=1)
        return functional.linear(functional.silu(gate) * up, *part("linear_fc2"))
    return functional.linear(functional.gelu(inner), *part("linear_fc2"))


def _layer(values: dict[str, torch.Tensor], shape: ModelConfig, hidden_NH: torch.Tensor) -> torch.Tensor:
    """The MoE layer 0 written out: every expert computes every token."""
    moe, mlp = shape.moe, "decoder.layers.0.mlp"
    assert moe is not None
    logits = hidden_NH @ values[f"{mlp}.router.weight"].t()
    if moe.bias_update_rate:
        scores = logits.sigmoid()
        chosen = (scores + values[f"{mlp}.router.expert_bias"]).topk(moe.top_k).indices
    else:
        scores = logits.softmax(1)
        chosen = scores.topk(moe.top_k).indices
    weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
    if moe.top_k > 1:
        weights = weights / weights.sum(1, keepdim=True)
    experts = [_network(values, f"{mlp}.experts", hidden_NH, shape.family, expert) for expert in range(4)]
    output = sum(weights[:, [number]] * expert for number, expert in enumerate(experts))
    if moe.shared_expert:
        gate = (hidden_NH @ values[f"{mlp}.shared_expert_gate.weight"].t()).sigmoid()
        output = output + gate * _network(values, f"{mlp}.shared_expert", hidden_NH, shape.family)
    if moe.residual:
        mix = functional.linear(
            hidden_NH, values[f"{mlp}.residual_mix.weight"], values[f"{mlp}.residual_mix.bias"]
        ).softmax(1)
        output = mix[:, :1] * output + mix[:, 1:] * _network(values, f"{mlp}.residual", hidden_NH, shape.family)
    return output


@pytest.mark.parametrize("family", ["llama", "neox"])
@pytest.mark.parametrize(
    "moe",
    [
        {"top_k": 1},
        {},
        {"top_k": 3, "ffn_hidden_size": 24},
        {"shared_expert": 20},
        {"residual": True},
        {"bias_update_rate": 0.1},
    ],
    ids=str,
)
def test_a_layer_computes_its_formula(family: str, moe: dict) -> None:
    shape = _shape(family, **moe)
    model, values = _model(shape), _values(shape)
    _, layer = next(moe_layers(model.chunks))
    hidden_TBH = torch.randn(CONTEXT, 2, shape.hidden_size, generator=torch.Generator().manual_seed(2))
    output, bias = layer(hidden_TBH)
    assert bias is None
    expected = _layer(values, shape, hidden_TBH.flatten(0, 1)).view_as(output)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_one_expert_is_the_dense_model(family: str) -> None:
    shape = _shape(family, experts=1, top_k=1)
    dense = shape.model_copy(update={"moe": None})
    values = _values(dense)
    experts = {
        name.replace("mlp.linear", "mlp.experts.linear"): value[None] if ".mlp." in name else value
        for name, value in values.items()
    }
    routers = {f"decoder.layers.{layer}.mlp.router.weight": torch.ones(1, 32) for layer in range(2)}
    tokens = torch.from_numpy(_batch().tokens)
    torch.testing.assert_close(
        _model(shape, experts | routers).logits(tokens), _model(dense, values).logits(tokens), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("moe", [{}, {"residual": True, "every": 2}, {"shared_expert": 20, "experts": [2, 4]}], ids=str)
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_process_alone_holds_all_weights(family: str, moe: dict) -> None:
    shape = _shape(family, **moe)
    model = _model(shape)
    held: dict[str, list] = {}
    for weight in model.weights():
        held.setdefault(weight.name, []).append(weight.spec.expert)
    assert set(held) == set(model.specs)
    for name, spec in model.specs.items():
        assert held[name] == (list(range(spec.shape[0])) if spec.is_expert else [None])
    assert sum(math.prod(spec.shape) for spec in model.specs.values()) == count_parameters(shape, VOCABULARY)


def test_experts_start_different() -> None:
    shape = _shape()
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.initialize(seed=0)
    first = [weight.parameter for weight in model.weights() if weight.name.endswith("0.mlp.experts.linear_fc1.weight")]
    assert len(first) == 4
    assert all((one - other).std() > 0.02 for number, one in enumerate(first) for other in first[:number])


def _router(moe: dict, hidden: int = 8) -> Router:
    router = Router(MixtureOfExperts(**{"experts": 4, **moe}), experts=4, hidden_size=hidden)
    with torch.no_grad():
        router.weight.copy_(torch.randn(4, hidden, generator=torch.Generator().manual_seed(0)))
    return router


def test_auxiliary_losses_are_the_published_ones_without_padding() -> None:
    """Their gradient is that of coefficient times loss times the tokens that count."""
    moe = {"aux_loss": 0.3, "z_loss": 0.2, "top_k": 2}
    hidden_TBH = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    padding_TB = torch.zeros(6, 3, dtype=torch.bool)
    padding_TB[4:, 1] = padding_TB[1:, 2] = True
    router = _router(moe)
    weights, chosen = router(hidden_TBH, padding_TB)
    assert not chosen[padding_TB.flatten()].any() and not weights[padding_TB.flatten()].any()
    (weights * 0.0).sum().backward()

    real = hidden_TBH.detach()[~padding_TB]
    weight = router.weight.detach().clone().requires_grad_()
    logits = real @ weight.t()
    probabilities = logits.softmax(1)
    share = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 0.5).mean(0)  # of the choices
    balance = 4 * (share * probabilities.mean(0)).sum()
    z_loss = logits.logsumexp(1).square().mean()
    ((0.3 * balance + 0.2 * z_loss) * len(real)).backward()
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-4, atol=1e-6)
    assert not hidden_TBH.grad[padding_TB].any()
    sums = router.sums[4:] / len(real)
    torch.testing.assert_close(
        sums[[0, 2, 3]], torch.stack([torch.ones(()), balance, z_loss]).detach(), rtol=1e-4, atol=0
    )


def test_capacity_takes_first_choices_and_early_positions_first() -> None:
    moe = {"aux_loss": 0.0, "top_k": 2, "capacity_factor": 0.5, "min_capacity": 1}
    router = _router(moe)
    hidden_TBH = torch.ones(8, 1, 8)  # all choose the same two experts, which take 0.5 x 8 x 2 / 4 = 2 tokens each
    weights, chosen = router(hidden_TBH)
    assert chosen.sum(0).sort().values.tolist() == [0, 0, 2, 2]
    assert chosen[:2].sum() == 4 and not weights[2:].any()
    assert weights[:2].sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert router.sums[4:6].tolist() == [8, 12]  # tokens, dropped choices

    with torch.no_grad():
        router.train(False)
        _, chosen = router(hidden_TBH)
    assert chosen.sum() == 16, "evaluation drops nothing"
    assert router.sums[4:6].tolist() == [8, 12], "nor does it count"


def test_a_token_whose_second_expert_is_full_gives_its_first_all_weight() -> None:
    router = _router({"aux_loss": 0.0, "top_k": 2, "capacity_factor": 0.5, "min_capacity": 1}, hidden=4)
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    hidden_TBH = torch.tensor([[3.0, 2, 0, 0], [3, 2, 0, 0], [0, 3, 2, 0], [0, 0, 2, 3.0]])[:, None]  # capacity 1
    weights, chosen = router(hidden_TBH)
    # First choices are of experts 0, 0, 1, 3, second ones of 1, 1, 2, 2.
    assert chosen.tolist() == [
        [True, False, False, False],
        [False] * 4,
        [False, True, True, False],
        [False, False, False, True],
    ]
    assert weights[0].tolist() == pytest.approx([1, 0, 0, 0]) and weights[2].sum().item() == pytest.approx(1)


def test_padding_changes_nothing() -> None:
    batch = _batch()
    other = batch._replace(tokens=np.where(batch.mask > 0, batch.tokens, 7))
    assert (other.tokens != batch.tokens).any()
    outcomes = []
    for tokens in (batch, other):
        engine = _engine(_shape(z_loss=0.01, shared_expert=20))
        stats = engine.train_step(tokens, learning_rate=1e-2)
        outcomes.append((stats, engine.gate_statistics(), engine.gradients()))
    assert outcomes[0][:2] == outcomes[1][:2]
    assert all(torch.equal(outcomes[0][2][name], outcomes[1][2][name]) for name in outcomes[0][2])


def test_the_reported_loss_is_the_cross_entropy_alone() -> None:
    with_aux, without = _engine(_shape(aux_loss=1.0, z_loss=1.0)), _engine(_shape(aux_loss=0.0))
    assert (
        with_aux.train_step(_batch(), learning_rate=1e-2).loss == without.train_step(_batch(), learning_rate=1e-2).loss
    )


def test_recomputed_layers_count_their_tokens_once() -> None:
    found = []
    for recompute in ("none", "selective", "full"):
        shape, parallel = _shape(bias_update_rate=0.1), ParallelConfig(recompute=recompute)
        model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, parallel=parallel)
        model.load(_values(shape))
        engine = MegatronEngine(model, parallel=parallel, optimizer=Optimizer(), micro_batch_size=4)
        stats = engine.train_step(_batch(), learning_rate=1e-2)
        found.append((stats, engine.gate_statistics()))
    assert found[0] == found[1] == found[2]


def test_statistics_are_of_the_steps_since_the_last_call() -> None:
    engine = _engine(_shape(capacity_factor=0.5, min_capacity=1))
    engine.train_step(_batch(), learning_rate=0.0)
    once = engine.gate_statistics()
    engine.evaluate([_batch()])
    engine.train_step(_batch(), learning_rate=0.0)
    assert engine.gate_statistics() == once
    for layer in once:
        assert sum(layer.load) == pytest.approx(1) and 0 < layer.dropped < 1
        assert 0 < layer.entropy < math.log(4) and layer.aux_loss > 0 and layer.z_loss > 0


def test_a_skipped_step_counts_nowhere() -> None:
    engine = _engine(_shape(bias_update_rate=0.25))
    tokens = engine.accumulate_gradients(_batch()).tokens
    assert engine.apply_gradients(LossSum(math.nan, tokens), learning_rate=1e-2).skipped
    assert engine.gate_statistics() == []
    engine.train_step(_batch(), learning_rate=0.0)
    other = _engine(_shape(bias_update_rate=0.25))
    other.train_step(_batch(), learning_rate=0.0)
    assert engine.gate_statistics() == other.gate_statistics()


def test_what_means_nothing_is_refused() -> None:
    assert MixtureOfExperts(experts=4, bias_update_rate=0.01).aux_loss == 0
    assert MixtureOfExperts(experts=4, bias_update_rate=0.01, aux_loss=0.02).aux_loss == 0.02
    for settings, words in (
        ({"capacity_factor": 1e-9}, "would drop 100% of the tokens' choices or more: set it to 0.25 or more"),
        ({"min_capacity": 8}, "min_capacity 8 is of a capacity_factor, and there is none"),
        ({"top_k": 5}, "top_k 5 is more than experts 4"),
    ):
        with pytest.raises(ValidationError, match=words):
            MixtureOfExperts(experts=4, **settings)


def test_biases_move_towards_experts_that_are_chosen_less() -> None:
    engine = _engine(_shape(bias_update_rate=0.25, aux_loss=0.0))
    name = "decoder.layers.0.mlp.router.expert_bias"
    before = engine.weights()[name].clone()
    engine.train_step(_batch(), learning_rate=1e-2)
    load = torch.tensor(engine.gate_statistics()[0].load)
    torch.testing.assert_close(engine.weights()[name] - before, 0.25 * (0.25 - load).sign())
    assert not any("expert_bias" in key for key in engine.optimizer_state())


def test_a_starving_expert_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    records = GateRecords()
    starved = [GateStatistics(3, [0.5, 0.48, 0.02, 0.0], 0.0, 1.0, 1.0, 1.0)]
    for step in (10, 20):
        (gate,) = records.record(starved, step=step)["gates"]
    assert gate["load_max"] == 2 and gate["load_min"] == 0
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] + message.split(":")[1] for message in said] == [
        f"step 10 layer 3, expert {expert}" for expert in (2, 3)
    ]
    assert records.record([], step=30) == {}
