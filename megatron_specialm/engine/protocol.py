"""What the training loop and parity ask of an engine. They know engines by this protocol only."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import torch

from megatron_specialm.checkpoint.slices import SavedTensors
from megatron_specialm.data.store import Batch
from megatron_specialm.estimate.setup import Passes
from megatron_specialm.model.weights import Sliceable


class LossSum(NamedTuple):
    """A sum of negative log-likelihoods in nats and the number of tokens in it. Sums, never means: they add exactly.

    slots: the token positions that were computed for it, padding included.
    saved: the keys that attention did not read for them, because windows are shorter than the context (`keys_saved`).
    """

    total: float
    tokens: int
    slots: int = 0
    saved: int = 0

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.total / self.tokens


class StepStats(NamedTuple):
    """One optimizer step, over the global batch. `skipped`: loss or gradient was not finite, weights are unchanged."""

    loss: LossSum
    gradient_norm: float
    skipped: bool


class GateStatistics(NamedTuple):
    """What the router of an MoE layer did with the training tokens of some steps, over all processes. Padding does not count.

    layer: its number in the model, from 0.
    load: by expert, its share of all choices, before any was dropped. Even: 1 over the number of experts.
    dropped: the share of choices that the experts' capacity did not allow.
    aux_loss, z_loss: without their coefficients, means over tokens. An aux_loss of 1 is an even load.
    entropy: mean entropy of a token's probabilities of the experts, in nats.
    """

    layer: int
    load: list[float]
    dropped: float
    aux_loss: float
    z_loss: float
    entropy: float


class Engine(Protocol):
    """A model with its optimizer, spread over the processes of a layout (`open_engine`).

    data_rank: the data-parallel copy of the model that this process belongs to, from 0.
    data_parallel: the number of such copies. Each trains on its own rows of a global batch.
    device_name: of this process's device, as its maker calls it; `cpu` where it is none.
    passes: those that all copies have made so far; within `evaluate`, as if all made as many as this one.
    """

    data_rank: int
    data_parallel: int
    device_name: str
    passes: Passes

    def kernels(self) -> str:
        """Which fused kernels run here, in one line."""

    def train_step(self, batch: Batch, *, learning_rate: float) -> StepStats:
        """One optimizer step on this copy's rows of the global batch; gradient accumulation inside."""

    def accumulate_gradients(self, batch: Batch) -> LossSum:
        """The first half of a step: forward and backward passes, gradients summed over all processes."""

    def apply_gradients(self, loss: LossSum, *, learning_rate: float) -> StepStats:
        """The second half: clip by the global norm and step; where anything is not finite, leave the weights alone."""

    def gradients(self) -> dict[str, torch.Tensor]:
        """The canonical gradients of the last step, on the CPU, each on one process. Clipping may have scaled them."""

    def norm_squares(self) -> dict[str, float]:
        """By weight, the sum of squares with which this process's gradients entered the norm of the last step, as clipped.
        Summed over all processes it is the canonical gradient's: nothing is left out or counted twice."""

    def gate_statistics(self) -> list[GateStatistics]:
        """The statistics of each MoE layer over the steps since the last call; empty for a dense model. All processes call this
        at once."""

    def evaluate(self, batches: Iterable[Batch]) -> LossSum:
        """The loss over all copies' batches. Each copy passes its own, of which there may be none."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Canonical fp32 weights, on the CPU: the slices that this process is to save, by their keys (`checkpoint/slices.py`).
        Over all processes, each element is there once."""

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimizer's tensors under canonical names, on the CPU, in slices as the weights."""

    def begin_copy(self) -> Future[SavedTensors]:
        """Begin to copy what `weights` and `optimizer_state` return, while the next forward and backward passes run:
        `apply_gradients` waits for it before anything changes, and raises its error. At most one copy is under way."""

    def load(self, weights: Mapping[str, Sliceable], optimizer_state: Mapping[str, Sliceable] | None) -> None:
        """Take weights, and the optimizer's state where training goes on from it. Both are complete: each process reads the
        slices that it holds.

        Raises:
            CheckpointError: they are of another model.
        """

    def limit_collectives(self, seconds: float) -> None:
        """From here on, let a collective fail that takes longer than this."""
