"""An oracle for updates: torch's AdamW with explicit groups, on canonical weights, by the gradients of an engine."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_specialm.base.environment import World
from megatron_specialm.config.training import Optimizer
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.protocol import LossSum, StepStats
from megatron_specialm.parity.case import ParityCase
from megatron_specialm.parity.rank import measure

# Every other weight is one number per row or column, or scales whole matrices.
_DECAYED = re.compile(
    r"(linear_\w+\.(weight|weight_basis|lora_a|lora_b)|word_embeddings\.weight|output_layer\.weight)(\[|$)"
)


class Follower:
    """Repeats what an engine does, from its present weights on, and expects the same weights.

    In a layout each process follows the weights that it is dealt.
    """

    def __init__(self, engine: MegatronEngine, settings: Optimizer) -> None:
        self._clip_grad = settings.clip_grad
        gradients = engine.gradients()
        self.weights = {name: tensor.clone() for name, tensor in engine.weights().items() if name in gradients}
        decayed = [tensor for name, tensor in self.weights.items() if _DECAYED.search(name)]
        others = [tensor for name, tensor in self.weights.items() if not _DECAYED.search(name)]
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
        )

    def follow(self, gradients: Mapping[str, torch.Tensor], stats: StepStats, *, learning_rate: float) -> None:
        """One update, by gradients before they were clipped."""
        factor = min(1.0, self._clip_grad / (stats.gradient_norm + 1e-6))
        for name, tensor in self.weights.items():
            tensor.grad = gradients[name] * factor
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()

    def check(self, engine: MegatronEngine) -> None:
        """Compare every weight that is trained."""
        found = engine.weights()
        apart = {name: float((found[name] - tensor).abs().max()) for name, tensor in self.weights.items()}
        wrong = {name: difference for name, difference in apart.items() if not difference <= 1e-6}
        assert not wrong, f"{len(wrong)} of {len(apart)} weights differ from AdamW's: {wrong}"


def measure_beside_adamw(case: ParityCase, world: World, folder: Path) -> None:
    """A process of a parity run whose every update is followed."""
    settings = Optimizer(clip_grad=case.clip_grad, epsilon=case.epsilon, weight_decay=0.1)  # as `measure` has it
    followers: dict[MegatronEngine, Follower] = {}
    healthy = MegatronEngine.apply_gradients

    def followed(engine: MegatronEngine, loss: LossSum, *, learning_rate: float) -> StepStats:
        if engine not in followers:
            followers[engine] = Follower(engine, settings)
        gradients = engine.gradients()
        stats = healthy(engine, loss, learning_rate=learning_rate)
        followers[engine].follow(gradients, stats, learning_rate=learning_rate)
        followers[engine].check(engine)
        return stats

    MegatronEngine.apply_gradients = followed  # type: ignore[method-assign]
    measure(case, world, folder)
