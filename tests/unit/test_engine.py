import threading
import time
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.optim.adamw import adamw

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import Batch
from megatron_specialm.engine import state
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.model.gpt import Gpt
from tests.adamw import Follower
from tests.training import EPSILON

VOCABULARY, CONTEXT = 100, 16

pytestmark = pytest.mark.usefixtures("alone")


def _engine(shape: ModelConfig, *, micro_batch_size: int = 4, precision: str = "fp32", **optimizer) -> MegatronEngine:
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT, precision=precision)
    model.initialize(seed=0)
    return MegatronEngine(
        model, parallel=ParallelConfig(), optimizer=Optimizer(**optimizer), micro_batch_size=micro_batch_size
    )


def _batch(seed: int = 0, rows: int = 8) -> Batch:
    """Windows of uneven length, as real text has them."""
    generator = np.random.default_rng(seed)
    windows = generator.integers(0, VOCABULARY, (rows, CONTEXT + 1))
    lengths = generator.integers(1, CONTEXT + 1, rows)
    mask = (np.arange(CONTEXT) < lengths[:, None]).astype(np.float32)
    return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), mask)


def _train(engine: MegatronEngine, steps: int = 3, start: int = 0) -> dict[str, torch.Tensor]:
    for step in range(start, start + steps):
        engine.train_step(_batch(step), learning_rate=1e-2)
    return engine.weights()


def test_one_step_is_plain_pytorch(neox: ModelConfig) -> None:
    """The oracle: torch's own loss, clipping and AdamW on the same model."""
    engine = _engine(neox, clip_grad=0.1, epsilon=EPSILON)
    model = Gpt(neox, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.initialize(seed=0)
    (whole,) = model.chunks
    adam = torch.optim.AdamW(whole.parameters(), lr=1e-2, eps=EPSILON, weight_decay=0.0)
    for step in range(3):
        batch = _batch(step)
        stats = engine.train_step(batch, learning_rate=1e-2)
        logits = model.logits(torch.from_numpy(batch.tokens))
        targets = torch.from_numpy(np.where(batch.mask > 0, batch.targets, -100))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        adam.step()
        assert stats.loss.mean == pytest.approx(loss.item(), rel=1e-5)
        assert stats.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    weights = engine.weights()
    for name, parameter, spec in model.weights():
        torch.testing.assert_close(weights[name], parameter.detach()[: spec.shape[0]], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["neox", "llama"])
def test_weight_decay_reaches_matrices_alone(family: str, precision: str, request: pytest.FixtureRequest) -> None:
    """The oracle: torch's AdamW with explicit groups, before and after going on from saved state."""
    shape, settings = request.getfixturevalue(family), {"weight_decay": 0.3, "epsilon": 1e-3}
    engine = _engine(shape, precision=precision, **settings)
    follower = Follower(engine, Optimizer(**settings))
    for step in range(4):
        if step == 2:
            weights, state = engine.weights(), engine.optimizer_state()
            engine = _engine(shape, precision=precision, **settings)
            engine.load(weights, state)
        loss, gradients = engine.accumulate_gradients(_batch(step)), engine.gradients()
        stats = engine.apply_gradients(loss, learning_rate=1e-2)
        follower.follow(gradients, stats, learning_rate=1e-2)
        follower.check(engine)


def test_accumulation_over_micro_batches_changes_nothing(neox: ModelConfig) -> None:
    whole, parts = (_train(_engine(neox, micro_batch_size=size, epsilon=EPSILON)) for size in (8, 1))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_going_on_from_saved_state_is_exact(neox: ModelConfig, precision: str) -> None:
    engine = _engine(neox, precision=precision)
    _train(engine, 2)
    weights, state = engine.weights(), engine.optimizer_state()
    restored = _engine(neox, precision=precision)
    restored.load(weights, state)
    straight, resumed = _train(engine, 2, start=2), _train(restored, 2, start=2)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_until_what_is_being_copied_may_change(
    neox: ModelConfig, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _engine(neox, precision=precision)
    _train(engine, 2)
    expected = engine.weights(), engine.optimizer_state()
    passes_are_done, copied = threading.Event(), state._copied

    def slowly(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert passes_are_done.wait(60), "the passes waited for the copy, too"
        time.sleep(0.2)
        return copied(tensors)

    with monkeypatch.context() as patch:
        patch.setattr(state, "_copied", slowly)
        found = engine.begin_copy()
        loss = engine.accumulate_gradients(_batch(2))
        passes_are_done.set()
        engine.apply_gradients(loss, learning_rate=1e-2)
    for before, copy in zip(expected, found.result(), strict=True):
        assert before.keys() == copy.keys() and all(torch.equal(before[name], copy[name]) for name in before)
    assert not torch.equal(
        engine.weights()["decoder.final_layernorm.weight"], expected[0]["decoder.final_layernorm.weight"]
    )


def test_a_step_that_is_not_finite_leaves_the_weights(neox: ModelConfig) -> None:
    engine = _engine(neox)
    _train(engine, 1)
    weights = engine.weights()
    poisoned = {**weights, "decoder.final_layernorm.weight": weights["decoder.final_layernorm.weight"] * float("nan")}
    engine.load(poisoned, engine.optimizer_state())
    stats = engine.train_step(_batch(), learning_rate=1e-2)
    assert stats.skipped
    after = engine.weights()
    assert all(torch.equal(after[name], weights[name]) for name in weights if name != "decoder.final_layernorm.weight")


def test_bf16_follows_fp32(neox: ModelConfig) -> None:
    full, half = _engine(neox), _engine(neox, precision="bf16")
    for step in range(5):
        a, b = (engine.train_step(_batch(step), learning_rate=1e-2) for engine in (full, half))
        assert b.loss.mean == pytest.approx(a.loss.mean, rel=1e-2)


def test_evaluation_counts_every_real_token_once(neox: ModelConfig) -> None:
    engine, batch = _engine(neox), _batch()
    whole = engine.evaluate([batch])
    rows = [batch.rows(slice(row, row + 1)) for row in range(len(batch.tokens))]
    assert whole.tokens == int(batch.mask.sum())
    assert engine.evaluate(rows).total == pytest.approx(whole.total, rel=1e-5)


def test_fused_optimizers_that_are_installed_are_not_used_without_a_gpu(
    neox: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Megatron-Core finds itself where Transformer Engine is installed: its kernels end with "no NVIDIA driver"."""
    from megatron.core import optimizer
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as scalings

    from megatron_specialm.model import cpu

    def kernel(*_, **__):
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(optimizer, "Adam", kernel)
    for module, names in (
        (clip_grads, ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_impl")),
        (scalings, ("multi_tensor_applier", "multi_tensor_scale_impl")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, kernel)
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        _engine(neox, precision="bf16")
    cpu._take_no_fused_optimizer()
    _train(_engine(neox, precision="bf16"))


class _AdamOfGroups(torch.optim.Optimizer):
    """Counts as Transformer Engine's FusedAdam does: per group, and not for one that is empty."""

    def __init__(self, params, *, adam_w_mode: bool, **settings) -> None:
        super().__init__(params, settings)
        assert adam_w_mode

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update({name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")})
                counted = torch.tensor(float(group["step"] - 1))
                adamw(
                    [parameter], [parameter.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [counted],
                    amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                    weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                )  # fmt: skip


def test_going_on_twice_with_an_adam_that_counts_per_group(neox: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import optimizer

    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(optimizer, "Adam", _AdamOfGroups)
    straight = _train(_engine(neox), steps=6)
    engine = _engine(neox)
    for attempt in range(3):
        _train(engine, steps=2, start=2 * attempt)
        weights, moments = engine.weights(), engine.optimizer_state()
        assert float(moments["step"]) == 2 * (attempt + 1)
        engine = _engine(neox)
        engine.load(weights, moments)
    for name, weight in engine.weights().items():
        torch.testing.assert_close(weight, straight[name], rtol=0, atol=0)
