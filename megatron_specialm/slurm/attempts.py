"""Whether a job that has not finished is queued again. Preemptions are free; time limits and failures have a budget; and what
fails three times at the same step would fail a fourth time: a poisoned checkpoint or a loss that is not finite is no bad luck.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_specialm.config.site import Limits
from megatron_specialm.slurm.records import Attempt, Outcome

SAME_STEP = 3
WRONG_INPUT = 2  # the exit code of errors that a second attempt cannot mend


@dataclass(frozen=True)
class Ending:
    """How an attempt ended. `nodes` are to be left out of the next one; `exit_code` is the ranks' own."""

    outcome: Outcome
    reason: str
    step: int | None = None
    nodes: tuple[str, ...] = ()
    exit_code: int = 1


def reason_to_end(ending: Ending, before: Sequence[Attempt], limits: Limits) -> str | None:
    """Why the job is not queued again; None where it is.

    Args:
        before: the attempts before this one. One without an end was lost with its node, and counts as a failure.
    """
    if ending.outcome == "preempted":
        return None
    if ending.outcome == "timeout":
        timeouts = 1 + sum(attempt.end is not None and attempt.end.outcome == "timeout" for attempt in before)
        return f"{timeouts} time limits were reached (limits.timeouts)" if timeouts > limits.timeouts else None
    if ending.exit_code == WRONG_INPUT:
        return "another attempt would end the same way"
    failed = [
        attempt for attempt in before if attempt.end is None or attempt.end.outcome in ("failed", "hang", "bad-node")
    ]
    in_a_row = [attempt.end.step if attempt.end else None for attempt in failed[-SAME_STEP + 1 :]]
    if ending.outcome != "bad-node" and in_a_row == [ending.step] * (SAME_STEP - 1):
        where = "before the first step" if ending.step is None else f"at step {ending.step}"
        return f"it has failed {SAME_STEP} times {where}"
    if len(failed) + 1 > limits.failures:
        return f"{len(failed) + 1} attempts have failed (limits.failures)"
    return None
