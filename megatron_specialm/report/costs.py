"""What a model cost: all tasks that it depends on, found by walking the graph.

Tasks that serve every domain (training on the generic set, tokenizing, embedding and clustering it) are generic cost, paid
once; tasks of a domain are specialization cost, paid for each domain again. `tokens` and `slots` are those of trainings,
trials of a selection left out; FLOPs and device-seconds are of all the tasks, so the clustering that SLM-is uses is counted
as its generic cost. Criteria that a selection only compared are in no model's cost: the ledger has separate entries for
them. docs/methods.md has the rule.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from megatron_specialm.base.artifacts import Marker
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import train_stages
from megatron_specialm.graph.tasks import Task, TaskId, ancestors
from megatron_specialm.report.rows import SPECIALIZATION

COMPARISON = "comparison"  # in the ledger only: part of no model's cost
COSTS = ("tokens", "flops", "device_seconds")
COUNTS = ("tokens", "slots")  # that only trainings have


def model_cost(
    pipeline: Pipeline, graph: Mapping[TaskId, Task], markers: Mapping[TaskId, Marker], model: TaskId
) -> dict[str, Any]:
    """A model's cost per phase, and the devices it was trained on: columns of `report/rows.py`.

    Args:
        markers: those of all the model's ancestors, at least.
    """
    measures = dict.fromkeys((*COSTS, *COUNTS))
    costs: dict[str, Any] = {f"{phase}_{what}": 0 for phase in (GENERIC, SPECIALIZATION) for what in measures}
    devices, trained = set(), train_stages(pipeline)
    for name in ancestors(graph, model, continued=False):  # its `whole_cost` has the steps that it took over
        cost = asdict(markers[name].whole_cost)
        if name.stage in trained:
            devices.add(cost["device"])
        else:
            cost |= dict.fromkeys(COUNTS, 0)
        for what in measures:
            costs[f"{phase_of(graph[name])}_{what}"] += cost[what]
    return {**costs, "devices": ", ".join(sorted(devices))}


def ledger_entries(task: Task, marker: Marker) -> Iterator[dict[str, Any]]:
    """A task's own cost, and the domain it was paid for. Further entries: the cost of an earlier training that this one
    continues, and of work for comparison only."""
    paid_for = {"task": str(task.id), "phase": phase_of(task), "domain": task.domain}
    yield {**paid_for, **asdict(marker.cost)}
    if marker.earlier is not None:
        yield {**paid_for, "earlier": marker.values["earlier"], **asdict(marker.earlier)}
    if marker.apart is not None:
        yield {**paid_for, "phase": COMPARISON, **asdict(marker.apart)}


def phase_of(task: Task) -> str:
    """`generic` or `specialization`."""
    return GENERIC if task.domain is None else SPECIALIZATION
