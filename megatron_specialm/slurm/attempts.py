"""Whether a job that has not finished is queued again. Preemptions are free. Time limits have a budget, and failures one that
counts those which came no further than the ones before: a training that loses a node a day but goes on is not given up. What
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
    steps = [attempt.step for attempt in failed]
    in_a_row = steps[-SAME_STEP + 1 :]
    if ending.outcome != "bad-node" and in_a_row == [ending.step] * (SAME_STEP - 1):
        where = "before the first step" if ending.step is None else f"at step {ending.step}"
        return f"it has failed {SAME_STEP} times {where}"
    without_progress = _since_progress([*steps, ending.step])
    if without_progress > limits.failures:
        return f"{without_progress} attempts have failed and come no further (limits.failures)"
    return None


def _since_progress(steps: Sequence[int | None]) -> int:
    """How many failures there were from the last one that came further than all before it."""
    best, count = -1, 0
    for step in steps:
        further = step is not None and step > best
        best, count = (step, 1) if further and step is not None else (best, count + 1)
    return count
