"""Before a run begins: which tasks are missing, whether this machine can do them, and which finished work is made again.

Only rank 0 does this, as it holds the run folder; it broadcasts the result to the others (`run/inline.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.environment import World
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.plan import PlannedTask, make_plan, select_tasks
from megatron_specialm.graph.redo import Redo, find_redo
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.inline import fit_to_ranks
from megatron_specialm.run.preflight import refuse_too_little_held_out


@dataclass(frozen=True)
class Prepared:
    """A run that can begin: the config fitted to the ranks, the chosen tasks, and those of them that are made again."""

    pipeline: Pipeline
    chosen: Mapping[TaskId, PlannedTask]
    redo: Mapping[TaskId, Redo]

    @property
    def missing(self) -> int:
        """The number of tasks to do."""
        return sum(planned.is_to_do for planned in self.chosen.values())


def prepare(
    pipeline: Pipeline, root: Path, world: World, *, only: str | None, until: str | None, keys: Sequence[str] | None
) -> Prepared:
    """Plan, and check the plan.

    Args:
        only, until, keys: as of `select_tasks`.

    Raises:
        SpecialmError: the config, its text, an input or the machine does not allow the run.
    """
    plan = make_plan(pipeline, root)
    chosen = select_tasks(plan, only=only, until=until, keys=keys)
    pipeline = fit_to_ranks(pipeline, chosen, world)
    to_do = {name.stage for name, planned in chosen.items() if planned.is_to_do}
    refuse_too_little_held_out(pipeline, plan, root, stages=to_do)
    return Prepared(pipeline, chosen, find_redo(pipeline, plan, root, chosen))
