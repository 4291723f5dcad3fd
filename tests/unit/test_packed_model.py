"""A packed sequence in a model: each window is computed as if it stood alone."""

from typing import Any

import numpy as np
import pytest
import torch

from megatron_specialm.config.model import LowRank, ModelConfig, Projection
from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.config.packing import Packing
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.data.store import MIXTURE
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.model import gpt, rotary
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.train.evaluation import score
from tests.training import CONTEXT, VOCABULARY, MemoryStore

pytestmark = pytest.mark.usefixtures("alone")


def _model(shape: ModelConfig) -> Gpt:
    model = Gpt(shape, vocabulary_size=VOCABULARY, context_length=CONTEXT)
    model.initialize(seed=0)
    return model.train(False)


@pytest.mark.parametrize("family", ["neox", "llama"])
@pytest.mark.parametrize("lengths", [(16,), (3, 16, 1, 7), (1, 1, 1), (8, 8)])
def test_logits_are_those_of_each_window_alone(
    family: str, lengths: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    model = _model(request.getfixturevalue(family))
    tokens = torch.randint(VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model.logits(tokens, lengths=lengths)[0].split(lengths)
        for window, found in zip(tokens[0].split(lengths), together, strict=True):
            torch.testing.assert_close(found, model.logits(window[None])[0], rtol=1e-4, atol=1e-5)


def test_a_score_is_that_of_padded_windows(neox: ModelConfig) -> None:
    model, store = _model(neox), MemoryStore(10)
    batches = [store.batch(ids) for ids in np.split(np.arange(10), [4, 8])]
    padded, found = (score(model, batches, packing=packing) for packing in ("none", "packed"))
    assert found.total == pytest.approx(padded.total, rel=1e-6) and found.tokens == padded.tokens
    assert (padded.slots, found.slots) == (10 * CONTEXT, padded.tokens)


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The cosines by which queries and keys are rotated, as they are used."""
    found: list[torch.Tensor] = []
    real = rotary._Rotation.apply

    def noted(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        found.append(cosines.squeeze())
        return real(states, cosines, sines)

    monkeypatch.setattr(rotary._Rotation, "apply", noted)
    return found


@pytest.mark.parametrize("lengths", [(5, 3, 16), (8, 8)])
def test_positions_start_at_0_in_each_window(
    neox: ModelConfig, lengths: tuple[int, ...], rotations: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary attention depends on differences of positions only, so no loss shows positions that run on."""
    model, tokens = _model(neox), torch.zeros(1, sum(lengths), dtype=torch.long)
    with torch.no_grad():
        model.logits(torch.zeros(1, CONTEXT, dtype=torch.long))
        expected = torch.cat([rotations[0][:length] for length in lengths])
        rotations.clear()
        model.logits(tokens, lengths=lengths)
        assert len(rotations) == 2 * neox.layers and all(torch.equal(found, expected) for found in rotations)

        healthy, tables = gpt.packed_windows, rotary._cosines_and_sines

        def running_on(lengths: tuple[int, ...], **settings: Any) -> Any:
            windows = healthy(lengths, **settings)
            windows.max_seqlen_q = windows.max_seqlen_kv = sum(lengths)
            return windows

        monkeypatch.setattr(gpt, "packed_windows", running_on)
        monkeypatch.setattr(rotary, "_cosines_and_sines", lambda angles, bounds: tables(angles, None))
        rotations.clear()
        model.logits(tokens, lengths=lengths)
        assert not torch.equal(rotations[0], expected)


EXPERTS = 4
VARIANTS = {
    "dense": {},
    "projected": {"projection": Projection(experts=EXPERTS, capacity=2, code_size=3)},
    "lora": {"lora": LowRank(rank=2)},
    "by-cluster": {"moe": MixtureOfExperts(experts=EXPERTS, route="cluster")},
    "routed": {"moe": MixtureOfExperts(experts=EXPERTS, bias_update_rate=0.01)},
}
FAULTS = {
    "attention leaks into the next window": lambda lengths: [sum(lengths)],
    "windows end a token late": lambda lengths: [lengths[0] + 1, *lengths[1:-1], lengths[-1] - 1],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_packing_changes_no_gradient_and_what_would_is_found(
    name: str, llama: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every kind of model. (Of distilled ones see test_distillation.py, in layouts test_packed_parity.py.)"""
    shape = llama.model_copy(update=VARIANTS[name])
    batch = MemoryStore(8).batch(np.arange(8))
    if shape.window_experts is not None:
        batch = batch._replace(extra_inputs={MIXTURE: np.eye(EXPERTS, dtype=np.float32)[np.arange(8) // 4]})

    def gradients(packing: Packing) -> dict[str, torch.Tensor]:
        engine = MegatronEngine(
            _model(shape), parallel=ParallelConfig(), optimizer=Optimizer(), micro_batch_size=2, packing=packing
        )
        engine.accumulate_gradients(batch)
        return engine.gradients()

    def gap(found: dict[str, torch.Tensor]) -> float:
        return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items() if one.any())

    expected, healthy = gradients("none"), gpt.packed_windows
    assert gap(gradients("packed")) < 1e-5
    for fault in FAULTS.values():
        monkeypatch.setattr(
            gpt, "packed_windows", lambda lengths, fault=fault, **device: healthy(fault(lengths), **device)
        )
        assert gap(gradients("packed")) > 1e-2
