"""What a model cost: everything its training rests on, found by walking the graph.

Tasks that serve every domain (training on the generic set, tokenizing, embedding and clustering it) are generic cost, paid
once; tasks of a domain are specialization cost, paid for each domain again. `tokens` and `slots` are those of trainings,
trials of a selection left out; FLOPs and device-seconds are of all the tasks, so the clustering that SLM-is rests on is
counted as its generic cost. Criteria that a selection was only compared with are nobody's cost: they stand in the ledger by
themselves. docs/methods.md has the rule.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from megatron_specialm.base.artifacts import Marker
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import train_stages
from megatron_specialm.graph.tasks import Task, TaskId, ancestors

SPECIALIZATION = "specialization"
COMPARISON = "comparison"  # in the ledger only: part of no model's cost
COSTS = ("tokens", "flops", "device_seconds")
COUNTS = ("tokens", "slots")  # that only trainings have
_ALL = dict.fromkeys((*COSTS, *COUNTS))
TASKS = (1, 7, 50)  # the numbers of domains that share the generic cost in the paper's total costs


def total_cost(costs: Mapping[str, Any], what: str, *, tasks: int) -> float:
    """C_total(N) = C_generic + N * C_specialization (Grangier et al., arXiv 2402.01093), of `what` in `COSTS`.

    Args:
        costs: a row of results, or anything with `generic_WHAT` and `specialization_WHAT`.
        tasks: N, the number of domains that are specialized to.
    """
    return costs[f"{GENERIC}_{what}"] + tasks * costs[f"{SPECIALIZATION}_{what}"]


def model_cost(
    pipeline: Pipeline, graph: Mapping[TaskId, Task], markers: Mapping[TaskId, Marker], model: TaskId
) -> dict[str, Any]:
    """The columns of a model's cost: per phase, in total for some numbers of tasks, how full its training's windows were,
    and the devices it was trained on.

    Args:
        markers: those of all the model's ancestors, at least.
    """
    costs: dict[str, Any] = {f"{phase}_{what}": 0 for phase in (GENERIC, SPECIALIZATION) for what in _ALL}
    devices, trained = set(), train_stages(pipeline)
    for name in ancestors(graph, model):
        cost = asdict(markers[name].whole_cost)
        if name.stage in trained:
            devices.add(cost["device"])
        else:
            cost |= dict.fromkeys(COUNTS, 0)
        for what in _ALL:
            costs[f"{phase_of(graph[name])}_{what}"] += cost[what]
    totals = {
        f"total_{what}_{tasks}": total_cost(costs, what, tasks=tasks)
        for what in ("flops", "device_seconds")
        for tasks in TASKS
    }
    return {**costs, **totals, "fill": fill(costs), "devices": ", ".join(sorted(devices))}


def fill(costs: Mapping[str, Any]) -> float | None:
    """Real tokens over slots of all trainings of a row; None where no slots were told."""
    tokens, slots = (sum(costs[f"{phase}_{what}"] for phase in (GENERIC, SPECIALIZATION)) for what in COUNTS)
    return tokens / slots if slots else None


def ledger_entries(task: Task, marker: Marker) -> Iterator[dict[str, Any]]:
    """A task's own cost, and for whom it was paid; where it went on from an earlier training, what that one had cost by then;
    and where it did work that decides nothing, that apart."""
    whose = {"task": str(task.id), "phase": phase_of(task), "domain": task.domain}
    yield {**whose, **asdict(marker.cost)}
    if marker.earlier is not None:
        yield {**whose, "earlier": marker.values["earlier"], **asdict(marker.earlier)}
    if marker.apart is not None:
        yield {**whose, "phase": COMPARISON, **asdict(marker.apart)}


def phase_of(task: Task) -> str:
    """`generic` or `specialization`."""
    return GENERIC if task.domain is None else SPECIALIZATION
