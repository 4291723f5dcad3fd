"""How long to fine-tune: the paper's rule by the size of the domain's set."""

import math

from megatron_specialm.config.training import TrainStage

# Sets of at most so many tokens, the factor on the learning rate, the most steps (Grangier et al., arXiv 2402.01093,
# section 4); of LoRA up to five times as many.
PAPER = ((1_000_000, 1 / 3, 2_000), (8_000_000, 1.0, 4_000), (math.inf, 1.0, 30_000))
LORA_FACTOR = 5


def with_steps(stage: TrainStage, steps: int) -> TrainStage:
    """The stage's settings for another number of steps; the warm-up is no longer than that."""
    schedule = stage.schedule.model_copy(update={"warmup_steps": min(stage.schedule.warmup_steps, steps)})
    return stage.model_copy(update={"steps": steps, "schedule": schedule})


def finetuning_recipe(stage: TrainStage, *, set_tokens: int) -> TrainStage:
    """The stage's settings under `recipe: paper`, for a domain set of so many tokens: `learning_rate` has base rates
    and `steps` is an upper limit, all lowered where the paper does."""
    factor, most = next((factor, most) for limit, factor, most in PAPER if set_tokens <= limit)
    steps = min(stage.steps, most * (LORA_FACTOR if stage.lora else 1))
    return with_steps(stage, steps).model_copy(update={"optimizer": stage.optimizer.scaled(factor)})
