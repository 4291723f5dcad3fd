"""Whether a job that has not finished is queued again: budgets, and failures that repeat themselves."""

from dataclasses import replace

import pytest

from megatron_specialm.config.site import Limits
from megatron_specialm.slurm.records import Attempt, AttemptBegin, AttemptEnd, Note, Outcome
from megatron_specialm.slurm.supervisor import Ending, why_not_requeued

LIMITS = Limits(timeouts=3, failures=4)


def _ended(outcome: Outcome, step: int | None = None) -> Attempt:
    return Attempt(AttemptBegin(0, "7_0", ("n1",), 1, 0.0), AttemptEnd(0, outcome, step, "why", True, 1.0))


LOST = replace(_ended("failed"), end=None)


def _why(outcome: Outcome, *before: Attempt, step: int | None = None, exit_code: int = 1) -> str | None:
    return why_not_requeued(Ending(outcome, "why", step, exit_code=exit_code), before, LIMITS)


def test_preemptions_count_for_nothing() -> None:
    many = [_ended("preempted", 1)] * 100
    assert _why("preempted", *many, *[_ended("failed", 1)] * 100, step=1) is None
    assert _why("timeout", *many, step=1) is None
    assert _why("failed", *many, step=1) is None


def test_time_limits_have_a_budget_of_their_own() -> None:
    failures = [_ended("failed", 1), LOST, _ended("hang", 0), _ended("bad-node")]
    timeouts = [_ended("timeout", step) for step in range(3)]
    assert _why("timeout", *failures, *timeouts[:2], step=9) is None
    why = _why("timeout", *failures, *timeouts, step=9)
    assert why is not None and why.startswith("4 time limits") and "limits.timeouts" in why
    assert _why("failed", *timeouts * 9, step=0) is None, "a failure is no time limit"


@pytest.mark.parametrize("other", [_ended("failed", 1), _ended("hang", 1), _ended("bad-node"), LOST])
@pytest.mark.parametrize("outcome", ["failed", "hang", "bad-node"])
def test_failures_of_any_sort_share_one(outcome: Outcome, other: Attempt) -> None:
    before = [_ended("failed", 20), _ended("failed", 10), other]
    assert _why(outcome, *before, step=5) is None
    why = _why(outcome, *before, _ended("failed", 4), step=5)
    assert why is not None and why.startswith("5 attempts failed") and "limits.failures" in why


def test_a_failure_that_came_further_than_all_before_starts_the_count_anew() -> None:
    slow = [_ended("failed", step) for step in (10, 20, 30, 40, 50, 60)]
    assert _why("failed", *slow, step=70) is None
    assert _why("failed", *slow, step=60) is None
    assert _why("failed", *slow, _ended("failed", 5), _ended("failed", 4), LOST, step=60) is not None
    lost = [replace(LOST, noted=Note(step)) for step in (10, 20, 30, 40, 50, 60)]
    assert _why("failed", *lost, step=61) is None


def test_three_failures_in_a_row_at_one_step_are_no_bad_luck() -> None:
    at_40 = _ended("failed", 40)
    assert _why("failed", at_40, step=40) is None
    assert _why("failed", at_40, at_40, step=40) == "it has failed 3 times at step 40"
    assert _why("hang", at_40, _ended("hang", 40), step=40) == "it has failed 3 times at step 40"
    assert _why("failed", at_40, at_40, step=41) is None
    assert _why("failed", at_40, _ended("failed", 41), step=40) is None
    assert _why("failed", at_40, _ended("preempted", 50), at_40, step=40) is not None, "a preemption mends nothing"
    assert _why("failed", _ended("failed"), LOST) == "it has failed 3 times before the first step"


def test_a_bad_node_is_no_failure_of_the_work() -> None:
    assert _why("bad-node", _ended("failed"), _ended("failed")) is None


def test_wrong_input_is_not_tried_again_but_a_stop_at_the_time_limit_is() -> None:
    assert _why("failed", exit_code=2) == "another attempt would end the same way"
    assert _why("failed", exit_code=3) is None
    assert _why("timeout", exit_code=2) is None


def test_no_budget_at_all() -> None:
    none = Limits(timeouts=0, failures=0)
    assert why_not_requeued(Ending("timeout", "why"), [], none) is not None
    assert why_not_requeued(Ending("failed", "why"), [], none) is not None
