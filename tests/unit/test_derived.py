"""Projected networks and LoRA, by what they reduce to: plain models, one per expert, and the base with its change."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from megatron_specialm.base.errors import TrainingError
from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import MIXTURE, Batch
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.objective import DeviceBatch, cross_entropy
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.merge import merge_lora, project
from megatron_specialm.model.weights import EXPERT_CODES, LINEAR_PLACES
from megatron_specialm.train.evaluation import score
from tests.adamw import Follower
from tests.checkpoints import assert_same_logits

VOCABULARY, CONTEXT, EXPERTS = 100, 16, 3
PROJECTION = Projection(experts=EXPERTS, capacity=4, code_size=5)
INDEPENDENT = Projection(experts=EXPERTS, capacity=EXPERTS, code_size=EXPERTS)
LORA = LowRank(rank=3, alpha=6)
FAMILIES = pytest.mark.parametrize("family", ["neox", "llama"])

pytestmark = pytest.mark.usefixtures("alone")
Weights = dict[str, torch.Tensor]


@pytest.fixture
def shape(family: str, request: pytest.FixtureRequest) -> ModelConfig:
    """The plain shape of a family."""
    return request.getfixturevalue(family)


def _with(shape: ModelConfig, **derived: Projection | LowRank) -> ModelConfig:
    return shape.model_copy(update=derived)


def _engine(shape: ModelConfig, *, precision: str = "fp32", recompute: str = "none", **optimizer) -> MegatronEngine:
    parallel = ParallelConfig(recompute=recompute)
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, precision=precision, parallel=parallel)
    model.initialize(seed=0)
    return MegatronEngine(model, parallel=parallel, optimizer=Optimizer(clip_grad=1e6, **optimizer), micro_batch_size=4)


def _plain(shape: ModelConfig, weights: Weights) -> Gpt:
    model = Gpt(shape.base_config, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.load(weights)
    return model


def _batch(seed: int, *mixtures_K: torch.Tensor) -> Batch:
    """Windows of uneven length, four of each mixture: a micro-batch."""
    generator = np.random.default_rng(seed)
    rows = 4 * max(len(mixtures_K), 1)
    windows = generator.integers(0, VOCABULARY, (rows, CONTEXT + 1))
    mask = (np.arange(CONTEXT) < generator.integers(1, CONTEXT + 1, rows)[:, None]).astype(np.float32)
    notes = {MIXTURE: torch.stack(mixtures_K).repeat_interleave(4, 0).numpy()} if mixtures_K else {}
    return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), mask, notes)


def _one_hot(expert: int) -> torch.Tensor:
    return torch.eye(EXPERTS)[expert]


def _random_weights(shape: ModelConfig, seed: int = 7) -> Weights:
    """Weights without zeros, so that nothing is right by having no part in the result."""
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.initialize(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    whole = {name: parameter.detach()[: spec.shape[0]].clone() for name, parameter, spec in model.weights()}
    return {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in whole.items()}


def _plain_gradients(model: Gpt, batch: Batch, rows: slice) -> tuple[torch.Tensor, Weights]:
    """The summed loss of some windows, and the gradient of the mean over all."""
    part = batch.rows(rows)
    on_device = DeviceBatch(*(torch.from_numpy(x) for x in (part.tokens, part.targets, part.mask)))  # type: ignore[arg-type]
    for chunk in model.chunks:
        chunk.zero_grad()
    total = cross_entropy(model.logits(on_device.tokens).transpose(0, 1), on_device)
    (total / batch.mask.sum()).backward()
    return total.detach(), {name: weight.grad[: spec.shape[0]] for name, weight, spec in model.weights()}


def _assert_close(found: Weights, expected: Weights) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) or 1.0
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=2e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


# --- projected networks -----------------------------------------------------------------------------------------------


def _independent(weights: Weights) -> Weights:
    """Codes one-hot, projections the identity: an expert's matrices are its own."""
    return {
        name: torch.eye(EXPERTS) if name == EXPERT_CODES or name.endswith("mlp.projection") else tensor
        for name, tensor in weights.items()
    }


@FAMILIES
def test_with_one_hot_codes_it_is_independent_experts(shape: ModelConfig) -> None:
    """Loss and gradients are those of plain models: of the expert's own matrices alone, of what is shared summed."""
    config = _with(shape, projection=INDEPENDENT)
    weights = _independent(_random_weights(config))
    batch = _batch(0, *(_one_hot(expert) for expert in range(EXPERTS)))
    engine = _engine(config)
    engine.load(weights, None)
    loss = engine.accumulate_gradients(batch)
    found = engine.gradients()
    expected: Weights = {}
    total = 0.0
    for expert in range(EXPERTS):
        own = project(weights, config, _one_hot(expert))
        assert all(
            torch.equal(own[name.removesuffix("_basis")], weights[name][expert]) for name in weights if "basis" in name
        )
        summed, gradients = _plain_gradients(_plain(config, own), batch, slice(4 * expert, 4 * expert + 4))
        total += float(summed)
        for name, gradient in gradients.items():
            if f"{name}_basis" in weights:
                expected.setdefault(f"{name}_basis", torch.zeros(EXPERTS, *gradient.shape))[expert] = gradient
            else:
                expected[name] = expected.get(name, 0) + gradient
    assert loss.total == pytest.approx(total, rel=1e-5)
    codes = {name for name in found if name == EXPERT_CODES or name.endswith("projection")}
    assert all(found[name].any() for name in codes)
    _assert_close({name: tensor for name, tensor in found.items() if name not in codes}, expected)


@FAMILIES
def test_with_one_expert_it_trains_as_the_plain_model(shape: ModelConfig) -> None:
    """h = k = m = 1, and codes that stay: one step gives the plain model's weights and logits."""
    config = _with(shape, projection=Projection(experts=1, capacity=1, code_size=1))
    weights = _random_weights(config)
    codes = [name for name in weights if name == EXPERT_CODES or name.endswith("mlp.projection")]
    weights |= {name: torch.ones(1, 1) for name in codes}
    ours, plain = _engine(config), _engine(shape)
    ours.load(weights, None)
    plain.load(project(weights, config, torch.ones(1)), None)
    batch = _batch(0, torch.ones(1), torch.ones(1))
    a, b = ours.accumulate_gradients(batch), plain.accumulate_gradients(batch._replace(extra_inputs={}))
    assert a.total == b.total
    gradients, after = plain.gradients(), {}
    for engine, loss in ((ours, a), (plain, b)):
        engine.apply_gradients(loss, learning_rate=1e-2)
        after[engine] = engine.weights()
    _assert_close(
        {name.removesuffix("_basis"): tensor.reshape(gradients[name.removesuffix("_basis")].shape)
         for name, tensor in after[ours].items() if name not in codes},
        after[plain],
    )  # fmt: skip


@FAMILIES
@pytest.mark.parametrize("mixture", [_one_hot(0), _one_hot(2), torch.tensor([0.2, 0.5, 0.3])], ids=["0", "2", "soup"])
def test_a_projected_expert_is_a_plain_model(shape: ModelConfig, mixture: torch.Tensor) -> None:
    config = _with(shape, projection=PROJECTION)
    weights = _random_weights(config)
    model = Gpt(config, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.load(weights)
    assert model.derived is not None
    model.derived.materialize(torch.stack([_one_hot(1), mixture]))
    model.derived.bind(0, 1)
    tokens = torch.from_numpy(_batch(0).tokens)
    plain = _plain(config, project(weights, config, mixture))
    assert_same_logits(model.logits(tokens), plain.logits(tokens))


@FAMILIES
@pytest.mark.parametrize(
    "projection",
    [
        Projection(experts=8, capacity=16, code_size=12),
        Projection(experts=8, capacity=5, code_size=12),
        Projection(experts=8, capacity=1, code_size=1),
    ],
    ids=["m<h", "m>h", "1"],
)
def test_every_expert_starts_as_a_well_scaled_model(shape: ModelConfig, projection: Projection) -> None:
    wide = shape.model_copy(update={"hidden_size": 64, "ffn_hidden_size": 256})
    config = _with(wide, projection=projection)
    weights, plain = (_engine(one).weights() for one in (config, wide))
    for expert in range(8):
        own = project(weights, config, torch.eye(8)[expert])
        for name in own:
            if "linear_fc" in name and name.endswith("weight"):
                assert float(own[name].std() / plain[name].std()) == pytest.approx(1, rel=0.03), name
        loss = score(_plain(config, own), [_batch(0)])
        assert loss.total / loss.tokens == pytest.approx(np.log(VOCABULARY), rel=0.02)


def test_evaluation_is_of_the_weights_as_they_are(neox: ModelConfig) -> None:
    """Neither variants of an earlier step nor another objective have a part in it, nor does it touch the training."""
    config = _with(neox, projection=PROJECTION)
    engine, mixture = _engine(config), torch.tensor([0.1, 0.2, 0.7])
    for step in range(2):
        engine.train_step(_batch(step, _one_hot(0), mixture), learning_rate=1e-2)
        held_out = _batch(9, _one_hot(0), _one_hot(1), mixture)
        weights = engine.weights()
        expected = 0.0
        for number, mixture_K in enumerate((_one_hot(0), _one_hot(1), mixture)):
            plain = _plain(config, project(weights, config, mixture_K))
            expected += score(plain, [held_out.rows(slice(4 * number, 4 * number + 4))]).total
        assert engine.evaluate([held_out]).total == pytest.approx(expected, rel=1e-5)


def test_windows_of_different_experts_in_a_micro_batch_are_refused(neox: ModelConfig) -> None:
    engine, batch = _engine(_with(neox, projection=PROJECTION)), _batch(0, _one_hot(0), _one_hot(1))
    with pytest.raises(TrainingError, match="4 windows has windows of different experts"):
        engine.train_step(batch.rows(slice(2, 6)), learning_rate=1e-2)
    short = engine.evaluate([batch.rows(slice(0, 3))])  # filled up with windows that do not count
    assert short.tokens == int(batch.mask[:3].sum())


# --- LoRA -------------------------------------------------------------------------------------------------------------


@FAMILIES
def test_lora_starts_as_its_base(shape: ModelConfig) -> None:
    batch = _batch(0)
    adapted, base = _engine(_with(shape, lora=LORA)), _engine(shape)
    assert adapted.evaluate([batch]) == base.evaluate([batch])
    assert adapted.accumulate_gradients(batch) == base.accumulate_gradients(batch)


@FAMILIES
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_lora_trains_adapters_alone_and_merges(shape: ModelConfig, recompute: str) -> None:
    config = _with(shape, lora=LORA)
    engine = _engine(config, recompute=recompute)
    before = engine.weights()
    losses = [engine.train_step(_batch(0), learning_rate=1e-2).loss.mean for _ in range(4)]
    assert losses[-1] < losses[0] - 0.05
    assert set(engine.gradients()) == {name for name in before if ".lora_" in name}
    after = engine.weights()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(engine.gradients())
    merged = _plain(config, merge_lora(after, config))
    assert engine.evaluate([_batch(1)]).total == pytest.approx(score(merged, [_batch(1)]).total, rel=1e-5)
    model = Gpt(config, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.load(after)
    assert model.derived is not None
    model.derived.materialize(torch.zeros(1, 1))
    model.derived.bind(0, 0)
    tokens = torch.from_numpy(_batch(1).tokens)
    assert_same_logits(model.logits(tokens), merged.logits(tokens))


# --- in bf16 ----------------------------------------------------------------------------------------------------------


def _in_bf16(config: ModelConfig) -> tuple[Gpt, MegatronEngine]:
    """A model, wide enough for averages over its weights, and its engine."""
    wide = config.model_copy(update={"hidden_size": 128, "ffn_hidden_size": 256})
    model = Gpt(wide, vocabulary_size=VOCABULARY, context_length=CONTEXT, precision="bf16")
    model.initialize(seed=0)
    return model, MegatronEngine(model, parallel=ParallelConfig(), optimizer=Optimizer(), micro_batch_size=4)


def _computed(model: Gpt, mixture_K: torch.Tensor) -> Weights:
    """The weights that a model computes, by the names that they have in an ordinary one."""
    assert model.derived is not None
    with torch.no_grad():
        model.derived.materialize(mixture_K[None])
    model.derived.bind(0, 0)
    found = {}
    for layer in range(model.config.layers):
        for place in (f"decoder.layers.{layer}.{place}" for place in LINEAR_PLACES.values()):
            weight = model.chunks[0].get_submodule(place).weight
            if not isinstance(weight, torch.nn.Parameter):
                found[f"{place}.weight"] = weight.detach()
    return found


def _check_served(model: Gpt, computed: Weights, served: Weights) -> None:
    """What is trained is the served model, rounded once: so are its weights, but for sums at a rounding's edge, and its
    logits are that model's in bf16."""
    for name, weight in computed.items():
        assert weight.dtype == torch.bfloat16
        assert (weight != served[name].bfloat16()).float().mean() < 1e-3, name
    plain = Gpt(model.config.base_config, vocabulary_size=VOCABULARY, context_length=CONTEXT, precision="bf16")
    plain.load(served)
    plain.chunks[0].bfloat16()
    tokens = torch.from_numpy(_batch(1).tokens)
    with torch.no_grad():
        apart = (model.logits(tokens).float() - plain.logits(tokens).float()).abs().mean()
    assert apart < 1e-4


def _share_seen(changes: Weights, wanted: Weights) -> float:
    """How much of the wanted changes there is, on average: 1 is all."""
    there = sum(float((changes[name].float() * wanted[name]).sum()) for name in wanted)
    return there / sum(float(change.square().sum()) for change in wanted.values())


@FAMILIES
def test_small_changes_of_lora_show_in_bf16(shape: ModelConfig) -> None:
    """The first steps at a small rate are far below a unit in the weights' last place."""
    model, engine = _in_bf16(_with(shape, lora=LORA))
    base, first = engine.weights(), _computed(model, torch.zeros(1))
    for step in range(2):
        engine.train_step(_batch(step), learning_rate=1e-5)
    after = engine.weights()
    served, computed = merge_lora(after, model.config), _computed(model, torch.zeros(1))
    wanted = {name: served[name] - base[name] for name in computed}
    assert max(float(change.abs().max()) for change in wanted.values()) < 2**-15
    assert _share_seen({name: computed[name].float() - first[name] for name in wanted}, wanted) == pytest.approx(1, 0.1)
    _check_served(model, computed, served)


@FAMILIES
def test_experts_that_differ_little_differ_in_bf16(shape: ModelConfig) -> None:
    """Codes that are equal when they are rounded."""
    model, engine = _in_bf16(_with(shape, projection=PROJECTION))
    weights = engine.weights()
    codes_KM = weights[EXPERT_CODES]
    codes_KM[0] = codes_KM[0].bfloat16()
    codes_KM[1] = codes_KM[0] * (1 + 2**-10)
    assert torch.equal(codes_KM[0].bfloat16(), codes_KM[1].bfloat16())
    # As the model holds them: what is compared is what is computed of them.
    weights |= {name: tensor.bfloat16().float() for name, tensor in weights.items() if name.endswith("basis")}
    engine.load(weights, None)
    served = [project(weights, model.config, _one_hot(expert)) for expert in (0, 1)]
    computed = [_computed(model, _one_hot(expert)) for expert in (0, 1)]
    wanted = {name: served[1][name] - served[0][name] for name in computed[0]}
    changes = {name: computed[1][name].float() - computed[0][name] for name in wanted}
    assert _share_seen(changes, wanted) == pytest.approx(1, 0.1)
    _check_served(model, computed[1], served[1])


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["projected", "lora"])
def derived(request: pytest.FixtureRequest, neox: ModelConfig) -> Iterator[ModelConfig]:
    """A model with derived weights."""
    yield _with(neox, projection=PROJECTION) if request.param == "projected" else _with(neox, lora=LORA)


def _train(engine: MegatronEngine, steps: range) -> Weights:
    for step in steps:
        mixtures = [_one_hot(step % EXPERTS), _one_hot(0), torch.tensor([0.5, 0.5, 0.0])]
        engine.train_step(_batch(step, *mixtures), learning_rate=1e-2)
    return engine.weights()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_going_on_from_saved_state_is_exact(derived: ModelConfig, precision: str) -> None:
    engine, restored = (_engine(derived, precision=precision) for _ in range(2))
    weights = _train(engine, range(2))
    restored.load(weights, engine.optimizer_state())
    straight, resumed = (_train(one, range(2, 4)) for one in (engine, restored))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert any(not torch.equal(straight[name], weights[name]) for name in straight)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weight_decay_reaches_bases_and_adapters(derived: ModelConfig, precision: str) -> None:
    """The oracle: torch's AdamW with explicit groups. Biases' bases, codes and projections do not decay."""
    settings = {"weight_decay": 0.3, "epsilon": 1e-3}
    engine = _engine(derived, precision=precision, **settings)
    follower = Follower(engine, Optimizer(clip_grad=1e6, **settings))
    for step in range(3):
        batch = _batch(step, _one_hot(step % EXPERTS), torch.tensor([0.5, 0.5, 0.0]))
        loss, gradients = engine.accumulate_gradients(batch), engine.gradients()
        stats = engine.apply_gradients(loss, learning_rate=1e-2)
        follower.follow(gradients, stats, learning_rate=1e-2)
        follower.check(engine)


def test_a_step_that_is_not_finite_leaves_the_weights(derived: ModelConfig) -> None:
    engine = _engine(derived)
    weights = _train(engine, range(1))
    norm = "decoder.final_layernorm.weight"
    engine.load({**weights, norm: weights[norm] * float("nan")}, engine.optimizer_state())
    assert engine.train_step(_batch(1, _one_hot(1)), learning_rate=1e-2).skipped
    after = engine.weights()
    assert all(torch.equal(after[name], weights[name]) for name in weights if name != norm)
    engine.load(weights, engine.optimizer_state())
    assert not engine.train_step(_batch(1, _one_hot(1)), learning_rate=1e-2).skipped
