"""The state of the training loop, besides the weights. It is in every checkpoint."""

import math
import statistics
from dataclasses import dataclass, replace

from megatron_specialm.engine.protocol import StepStats

SPIKE_WINDOW = 100  # steps whose median gradient norm a spike is compared with
FEWEST_NORMS = 20  # with fewer norms no step counts as a spike


@dataclass(frozen=True)
class TrainingState:
    """The state after `step` optimizer steps. Losses are in nats per token. `slots` are the token positions computed for
    `tokens`, padding included. `norms` are the finite gradient norms of the last steps. (Checkpoints of earlier versions lack
    both.)"""

    step: int = 0
    tokens: int = 0
    slots: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    spikes: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations: int = 0
    evaluations_without_gain: int = 0
    norms: tuple[float, ...] = ()

    def is_spike(self, norm: float, *, factor: float) -> bool:
        """Whether a step's gradient norm is more than `factor` times the usual one."""
        return len(self.norms) >= FEWEST_NORMS and norm > factor * statistics.median(self.norms)

    def after(self, stats: StepStats, *, spike: bool) -> "TrainingState":
        """The progress after one more step."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + (0 if stats.skipped else stats.loss.tokens),
            slots=self.slots + (0 if stats.skipped else stats.loss.slots),
            skipped_steps=self.skipped_steps + stats.skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if stats.skipped else 0,
            spikes=self.spikes + spike,
            norms=(*self.norms, stats.gradient_norm)[-SPIKE_WINDOW:]
            if math.isfinite(stats.gradient_norm)
            else self.norms,
        )

    def evaluated(self, loss: float) -> "TrainingState":
        """The progress after a validation. A loss that is not finite is never the best."""
        counted = replace(self, evaluations=self.evaluations + 1)
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            return replace(counted, best_step=self.step, best_loss=loss, evaluations_without_gain=0)
        return replace(counted, evaluations_without_gain=self.evaluations_without_gain + 1)
