"""Learning rate as a pure function of the step."""

import math

from megatron_specialm.config.training import Schedule, TrainStage


def learning_rate(step: int, *, peak: float, steps: int, schedule: Schedule) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`.

    Warm-up rises linearly and reaches `peak` on its last step. Then `constant` stays; `cosine` falls to
    `final_fraction * peak` at the last step; `wsd` stays, and falls linearly to it over the last `decay_fraction`.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    start = decay_start(steps=steps, schedule=schedule)
    progress = max(0.0, (step + 1 - start) / max(steps - start, 1))
    fall = 0.5 * (1 - math.cos(math.pi * progress)) if schedule.kind == "cosine" else progress
    return peak * (1 - (1 - schedule.final_fraction) * fall)


def decay_start(*, steps: int, schedule: Schedule) -> int:
    """The first step (0-based) at which the rate decays; `steps` where it never does."""
    if schedule.kind == "constant":
        return steps
    if schedule.kind == "wsd":
        return max(schedule.warmup_steps, steps - round(schedule.decay_fraction * steps))
    return schedule.warmup_steps


def step_to_keep(settings: TrainStage) -> int | None:
    """The step whose checkpoint a training keeps beside its last ones, so that a longer training can continue from it: with
    `wsd` the last one before the decay. None where there is no such step, or where the last checkpoint serves."""
    if settings.schedule.kind != "wsd":
        return None
    return decay_start(steps=settings.steps, schedule=settings.schedule) or None


def steps_at_same_rates(one: TrainStage, other: TrainStage, *, most: int) -> int:
    """The number of first steps that two trainings make at exactly the same learning rates, at most `most`."""
    rates = ((_rate(one, step), _rate(other, step)) for step in range(most))
    return next((step for step, (ours, theirs) in enumerate(rates) if ours != theirs), most)


def _rate(settings: TrainStage, step: int) -> float:
    return learning_rate(step, peak=settings.optimizer.peak, steps=settings.steps, schedule=settings.schedule)
