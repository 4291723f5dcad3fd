"""Learning rate as a pure function of the step, and how long to train."""

import math

from megatron_specialm.config.schema import Schedule, TrainStage

# The paper's fine-tuning (section 4): sets of at most so many tokens, the factor on the learning rate, the most steps.
PAPER_FINETUNING = ((1_000_000, 1 / 3, 2_000), (8_000_000, 1.0, 4_000), (math.inf, 1.0, 30_000))


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


def with_steps(stage: TrainStage, steps: int) -> TrainStage:
    """The stage's settings for another number of steps; the warm-up is no longer than that."""
    schedule = stage.schedule.model_copy(update={"warmup_steps": min(stage.schedule.warmup_steps, steps)})
    return stage.model_copy(update={"steps": steps, "schedule": schedule})


def finetuning_recipe(stage: TrainStage, *, set_tokens: int) -> TrainStage:
    """The stage's settings under `recipe: paper`, for a domain set of so many tokens: `learning_rate` is the base rate
    and `steps` an upper limit, both lowered where the paper does (`PAPER_FINETUNING`)."""
    factor, most = next((factor, most) for limit, factor, most in PAPER_FINETUNING if set_tokens <= limit)
    rate = stage.optimizer.learning_rate * factor
    optimizer = stage.optimizer.model_copy(update={"learning_rate": rate})
    return with_steps(stage, min(stage.steps, most)).model_copy(update={"optimizer": optimizer})
