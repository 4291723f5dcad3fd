"""Before a run begins: what there is to do, whether it can be done here, and what finished work it makes anew.

The first rank's part, which holds the run folder; ranks beside it go by what it has found (`run/inline.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.environment import World
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.plan import PlannedTask, make_plan, select
from megatron_specialm.graph.redo import Redo, find_redo
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.inline import fit_to_ranks
from megatron_specialm.run.preflight import refuse_too_little_held_out


@dataclass(frozen=True)
class Prepared:
    """A run that can begin: the config as it fits the ranks, the tasks that it is about, and which of them are made anew."""

    pipeline: Pipeline
    chosen: Mapping[TaskId, PlannedTask]
    redo: Mapping[TaskId, Redo]

    @property
    def missing(self) -> int:
        """How many tasks somebody must work on."""
        return sum(planned.is_to_do for planned in self.chosen.values())


def prepare(
    pipeline: Pipeline, root: Path, world: World, *, only: str | None, until: str | None, keys: Sequence[str] | None
) -> Prepared:
    """Plan, and judge what is planned.

    Args:
        only, until, keys: as of `select`.

    Raises:
        SpecialmError: the config, its text, an input or the machine is not what the run needs.
    """
    plan = make_plan(pipeline, root)
    chosen = select(plan, only=only, until=until, keys=keys)
    pipeline = fit_to_ranks(pipeline, chosen, world)
    to_do = {name.stage for name, planned in chosen.items() if planned.is_to_do}
    refuse_too_little_held_out(pipeline, plan, root, stages=to_do)
    return Prepared(pipeline, chosen, find_redo(pipeline, plan, root, chosen))
