"""Parity of a case, by outcomes on one process that tests share."""

from functools import lru_cache

from megatron_specialm.parity.case import ParityCase
from megatron_specialm.parity.compare import Difference, Outcome, differences_of, outcome_of


def compare(case: ParityCase, **measure: str) -> list[Difference]:
    """As `megatron_specialm.parity.compare.compare`, beside one process; `measure` as of its `outcome_of`."""
    one = _outcome(case.on_one_process().model_dump_json())
    return differences_of(case, one, outcome_of(case, **measure))


@lru_cache(maxsize=64)
def _outcome(case: str) -> Outcome:
    return outcome_of(ParityCase.model_validate_json(case))
