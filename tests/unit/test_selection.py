"""Orders of experts by each criterion, what they cost, and the paper's fine-tuning."""

from typing import ClassVar

import numpy as np
import pytest

from megatron_specialm.base.errors import DataError, TrainingError
from megatron_specialm.config.finetuning import Capped, capped_warning, finetuning_recipe
from megatron_specialm.config.model import LowRank
from megatron_specialm.config.training import EarlyStopping
from megatron_specialm.config.trainings import DomainTraining
from megatron_specialm.train.selection import (
    best_first,
    by_finetuning,
    by_frequency,
    by_halving,
    halving_plan,
    halving_rounds,
)

KEYS = ["c0", "c1", "c2", "c3", "c4"]


class Tuned:
    """Experts whose loss falls at their own rate: the one that is best in the end is not the best at first."""

    final: ClassVar = {"c0": 3.0, "c1": 2.0, "c2": 2.5, "c3": 1.5, "c4": 4.0}
    start: ClassVar = {"c0": 3.5, "c1": 3.0, "c2": 2.6, "c3": 3.1, "c4": 9.0}

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    def __call__(self, key: str, steps: int) -> float:
        assert steps > self.steps.get(key, 0)  # a fine-tuning goes on, it does not begin again
        self.steps[key] = steps
        return self.final[key] + (self.start[key] - self.final[key]) * (1 - steps / 12)


def test_frequency_is_the_domains_histogram_over_trained_clusters() -> None:
    ranking = by_frequency(["c0", "c2", "c3"], np.array([0.1, 0.5, 0.15, 0.25, 0.0]), domain="law")
    assert ranking == ("c3", "c2", "c0")


def test_a_domain_in_no_trained_cluster_is_refused_with_the_expert_it_wants() -> None:
    with pytest.raises(DataError, match=r"law: none of its windows .*\(c0, c2\): train the expert c1"):
        by_frequency(["c0", "c2"], np.array([0.0, 0.7, 0.0, 0.3]), domain="law")


def test_fine_tune_all() -> None:
    tune = Tuned()
    assert by_finetuning(KEYS, tune, 12) == ("c3", "c1", "c2", "c0", "c4")
    assert set(tune.steps.values()) == {12}


def test_halving_keeps_the_better_half() -> None:
    tune = Tuned()
    order = by_halving(KEYS, tune, 12)
    assert order[0] == "c3" and sorted(order) == KEYS and order[-1] == "c4"
    assert halving_rounds(5, 12) == [4, 8, 12]  # five, three, two experts
    assert tune.steps["c4"] == 4 and tune.steps["c3"] == 12
    assert sum(tune.steps.values()) == 5 * 4 + 3 * 4 + 2 * 4
    assert halving_plan(5, 12) == [(5, 0, 4), (3, 4, 8), (2, 8, 12)]


def test_halving_of_one_expert_is_its_fine_tuning() -> None:
    assert by_halving(["c7"], lambda _, steps: float(steps), 12) == ("c7",)
    assert halving_plan(1, 12) == [(1, 0, 12)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_the_worst(bad: float) -> None:
    assert best_first({"c0": bad, "c1": 3.0, "c2": bad, "c3": 2.0}) == ("c3", "c1", "c0", "c2")
    losses = {"c0": bad, "c1": 3.0, "c2": 4.0, "c3": 2.0, "c4": bad}
    assert by_finetuning(KEYS, lambda key, _: losses[key], 4)[0] == "c3"
    assert by_halving(KEYS, lambda key, _: losses[key], 4)[0] == "c3"
    with pytest.raises(TrainingError, match="none of the experts c0, c1 has a finite loss"):
        best_first({"c0": bad, "c1": bad})


@pytest.mark.parametrize(
    ("set_tokens", "rate", "steps"),
    [(1_000_000, 1e-4, 2_000), (1_000_001, 3e-4, 4_000), (8_000_000, 3e-4, 4_000), (64_000_000, 3e-4, 30_000)],
)
def test_the_papers_fine_tuning(set_tokens: int, rate: float, steps: int) -> None:
    stage = DomainTraining.model_validate(
        {"kind": "train", "tokens": "tokens", "data": "domain", "init": "slm", "steps": 50_000, "recipe": "paper",
         "global_batch_size": 8, "optimizer": {"learning_rate": 3e-4}, "schedule": {"warmup_steps": 3_000}}
    )  # fmt: skip
    made = finetuning_recipe(stage, set_tokens=set_tokens)
    assert made.optimizer.learning_rate == pytest.approx(rate)
    assert made.steps == steps and made.schedule.warmup_steps == min(3_000, steps)
    adapted = finetuning_recipe(stage.model_copy(update={"lora": LowRank()}), set_tokens=set_tokens)
    assert adapted.steps == min(50_000, 5 * steps)


def test_a_warning_of_the_cap_says_what_helps() -> None:
    stage = DomainTraining(
        kind="train", tokens="t", data="domain", init="slm", steps=3000, global_batch_size=8, recipe="paper",
        early_stopping=EarlyStopping(evaluate_every=10),
    )  # fmt: skip
    domains = [Capped("law", 2000, 2000), Capped("med", 2000, 1990)]
    said = capped_warning("tuned", stage, domains)
    assert "tuned/law (2,000 steps, best step 2,000: still falling)" in said
    assert "tuned/med (2,000 steps, best step 1,990)" in said
    assert "stages.tuned.recipe=null" in said and "raise" not in said  # the config's steps are not what ended it
    said = capped_warning("tuned", stage, [Capped("law", 3000, 2990)])  # it may be the recipe's cap as well
    assert "raise stages.tuned.steps (now 3,000); where `recipe: paper` allows no more" in said
    plain = stage.model_copy(update={"recipe": None})
    many = capped_warning("tuned", plain, [Capped(f"d{number}", 3000, 3000) for number in range(50)])
    assert many.endswith(", 46 more: raise stages.tuned.steps (now 3,000)")
    assert "tuned/d3 (" in many and "tuned/d4 (" not in many
