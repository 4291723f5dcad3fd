"""How long to fine-tune: the paper's rule by the size of the domain's set, and the warning where the limit was too low."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from megatron_specialm.config.training import TrainStage

# Rows: the largest set in tokens, the factor on the learning rate, the limit on steps (Grangier et al., arXiv 2402.01093,
# section 4). With LoRA the limit is five times as high.
PAPER = ((1_000_000, 1 / 3, 2_000), (8_000_000, 1.0, 4_000), (math.inf, 1.0, 30_000))
LORA_FACTOR = 5
SHOWN_TASKS = 4  # tasks that a warning names


def with_steps(stage: TrainStage, steps: int) -> TrainStage:
    """The stage with another number of steps; its warm-up is cut to that."""
    schedule = stage.schedule.model_copy(update={"warmup_steps": min(stage.schedule.warmup_steps, steps)})
    return stage.model_copy(update={"steps": steps, "schedule": schedule})


def finetuning_recipe(stage: TrainStage, *, set_tokens: int) -> TrainStage:
    """The stage under `recipe: paper`, for a domain set of `set_tokens` tokens: learning rates are scaled and `steps` is
    limited as in the paper."""
    factor, most = next((factor, most) for limit, factor, most in PAPER if set_tokens <= limit)
    steps = min(stage.steps, most * (LORA_FACTOR if stage.lora else 1))
    return with_steps(stage, steps).model_copy(update={"optimizer": stage.optimizer.scaled(factor)})


class Capped(NamedTuple):
    """A fine-tuning that ended at its limit of steps: its key, how many it made, and the step with the best validation loss."""

    key: str
    steps: int
    best_step: int


def capped_warning(name: str, stage: TrainStage, capped: Sequence[Capped]) -> str:
    """A warning that the limit on steps ended some of a stage's fine-tunings before early stopping did, and what to change.
    With a recipe the limit may be the recipe's, not `steps`."""
    tasks = [f"{name}/{one.key} ({_how(one)})" for one in capped[:SHOWN_TASKS]]
    if len(capped) > SHOWN_TASKS:
        tasks.append(f"{len(capped) - SHOWN_TASKS} more")
    fixes = []
    if any(one.steps >= stage.steps for one in capped):
        fixes.append(f"raise stages.{name}.steps (now {stage.steps:,})")
    if stage.size_recipe is not None:
        fixes.append(
            f"where `recipe: {stage.size_recipe}` allows no more, set stages.{name}.recipe=null and a learning rate of your own"
        )
    return f"the cap on steps, not early stopping, ended {', '.join(tasks)}: {'; '.join(fixes)}"


def _how(one: Capped) -> str:
    falling = ": still falling" if one.best_step == one.steps else ""
    return f"{one.steps:,} steps, best step {one.best_step:,}{falling}"
