"""Learning rate as a pure function of the step."""

import math

from megatron_specialm.config.training import Schedule


def learning_rate(step: int, *, peak: float, steps: int, schedule: Schedule) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`.

    Warm-up rises linearly and reaches `peak` on its last step. Then `constant` stays; `cosine` falls to
    `final_fraction * peak` at the last step; `wsd` stays, and falls linearly to it over the last `decay_fraction`.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    decay_steps = steps - schedule.warmup_steps
    if schedule.kind == "wsd":
        decay_steps = min(decay_steps, round(schedule.decay_fraction * steps))
    progress = max(0.0, (step + 1 - (steps - decay_steps)) / max(decay_steps, 1))
    fall = 0.5 * (1 - math.cos(math.pi * progress)) if schedule.kind == "cosine" else progress
    return peak * (1 - (1 - schedule.final_fraction) * fall)
