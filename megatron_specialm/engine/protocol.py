"""What the loop asks of an engine, so that Megatron and DeepSpeed can serve it alike."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch

from megatron_specialm.data.store import Batch
from megatron_specialm.estimate.setup import Passes


class LossSum(NamedTuple):
    """A sum of negative log-likelihoods in nats and the number of tokens in it. Sums, never means: they add exactly."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.tokens


class StepStats(NamedTuple):
    """One optimizer step, over the global batch. `skipped`: loss or gradient was not finite, weights are unchanged."""

    loss: LossSum
    gradient_norm: float
    skipped: bool


class Engine(Protocol):
    """A model with its optimizer, spread over the processes of a run. `passes` are those that this process's copy of the
    model has made so far."""

    passes: Passes

    def train_step(self, batch: Batch, *, learning_rate: float) -> StepStats:
        """One optimizer step on this process's share of the global batch; gradient accumulation inside."""

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """The loss over all processes' batches."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Canonical fp32 weights, on the CPU: those that fall to this process to save, whole. Over all processes, each
        is there once."""

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors under canonical names, on the CPU, dealt out as the weights are."""

    def load(self, weights: Mapping[str, torch.Tensor], optimizer_state: Mapping[str, torch.Tensor] | None) -> None:
        """Take weights, and the optimizer's state where training goes on from it. Both are complete: each process
        takes its part."""
