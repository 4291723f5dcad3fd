"""What came out: `results.json`, `ledger.json` and the paper's table, made from the completion markers.

Cost of a model: everything its training rests on, found by walking the graph. Tasks that serve every domain (training on the
generic set, tokenizing, embedding and clustering it) are generic cost, paid once; tasks of a domain are specialization
cost, paid for each domain again. `tokens` are those trained on; FLOPs and device-seconds are of all the tasks, so the
clustering that SLM-is rests on is counted as its generic cost.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_specialm.base.artifacts import Marker, read_marker
from megatron_specialm.base.files import write_json
from megatron_specialm.config.graph import Task, TaskId, ancestors, model_task
from megatron_specialm.config.lineage import is_finetuned, method_of
from megatron_specialm.config.schema import GENERIC, EvaluateStage, Pipeline, TrainStage
from megatron_specialm.launch.plan import make_plan

COSTS = ("tokens", "flops", "device_seconds")


def write_results(pipeline: Pipeline, root: Path) -> dict[str, Any]:
    """Collect what has been evaluated so far; writes `results.json` and `ledger.json` and returns the former.

    Only artifacts that are current count: a number made from other settings or text is never shown beside new ones.
    """
    plan = make_plan(pipeline, root)
    graph = {name: planned.task for name, planned in plan.items()}
    markers = {
        name: marker
        for name, planned in plan.items()
        if planned.state == "done" and (marker := read_marker(root, *name)) is not None
    }
    rows = [row for name in markers for row in _rows(pipeline, graph, markers, name)]
    results = {"pipeline": pipeline.name, "rows": rows, "macro": _macro(rows, list(pipeline.text.domains))}
    write_json(root / "ledger.json", [_ledger_entry(graph[name], marker) for name, marker in markers.items()])
    write_json(root / "results.json", results)
    return results


def _rows(
    pipeline: Pipeline, graph: Mapping[TaskId, Task], markers: Mapping[TaskId, Marker], name: TaskId
) -> list[dict[str, Any]]:
    """One row per set that an evaluate task has scored; none where something that the model rests on is gone, for then
    its cost cannot be told."""
    model = model_task(pipeline, name.key) if isinstance(pipeline.stages[name.stage], EvaluateStage) else None
    if model is None or not markers.keys() >= set(ancestors(graph, model)):
        return []
    values = markers[name].values
    cost = _cost(pipeline, graph, markers, model)
    return [
        {
            "method": method_of(pipeline, model.stage),
            "domain": source,
            "finetuned": is_finetuned(pipeline, model.stage),
            "nll": score["nll"],
            "perplexity": math.exp(score["nll"]),
            "tokens_evaluated": score["tokens"],
            **cost,
            "inference_parameters": values["parameters"],
            "seed": pipeline.seed,
            "model": str(model),
        }
        for source, score in values["sets"].items()
    ]


def _cost(
    pipeline: Pipeline, graph: Mapping[TaskId, Task], markers: Mapping[TaskId, Marker], model: TaskId
) -> dict[str, float]:
    total: dict[str, float] = {f"{phase}_{what}": 0 for phase in (GENERIC, "specialization") for what in COSTS}
    for name in ancestors(graph, model):
        cost = asdict(markers[name].cost)
        if not isinstance(pipeline.stages[name.stage], TrainStage):
            cost["tokens"] = 0
        for what in COSTS:
            total[f"{_phase(graph[name])}_{what}"] += cost[what]
    return total


def _phase(task: Task) -> str:
    return GENERIC if task.domain is None else "specialization"


def _ledger_entry(task: Task, marker: Marker) -> dict[str, Any]:
    return {"task": str(task.id), "phase": _phase(task), "domain": task.domain, **asdict(marker.cost)}


def _macro(rows: Iterable[Mapping[str, Any]], domains: list[str]) -> list[dict[str, Any]]:
    """exp of the mean over domains of the mean nll per token: neither a mean of perplexities nor weighted by tokens."""
    by_state: dict[tuple[str, bool], dict[str, float]] = {}
    for row in rows:
        by_state.setdefault((row["method"], row["finetuned"]), {})[row["domain"]] = row["nll"]
    return [
        {
            "method": method,
            "finetuned": finetuned,
            "perplexity": math.exp(sum(nlls[domain] for domain in domains) / len(domains)),
        }
        for (method, finetuned), nlls in by_state.items()
        if all(domain in nlls for domain in domains)
    ]


# --- the table --------------------------------------------------------------------------------------------------------


def results_table(results: Mapping[str, Any]) -> Table:
    """The paper's table: perplexities, then costs; specialization cost is the mean over domains."""
    header, lines = _cells(results)
    table = Table(title="Perplexity on held-out documents, and cost", title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index < 2 else "right")
    for line in lines:
        table.add_row(*line)
    return table


def to_markdown(results: Mapping[str, Any]) -> str:
    """The same table in Markdown."""
    header, lines = _cells(results)
    rule = ["---", "---", *("---:" for _ in header[2:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) + "\n"


def _cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = results["rows"]
    sets = list(dict.fromkeys(row["domain"] for row in rows))
    macro = {(entry["method"], entry["finetuned"]): entry["perplexity"] for entry in results["macro"]}
    header = ["method", "fine-tuned", *sets, "macro"]
    for phase in ("gen.", "spec."):
        header += [f"{phase} tokens", f"{phase} FLOPs", f"{phase} s"]
    lines = []
    for state in dict.fromkeys((row["method"], row["finetuned"]) for row in rows):
        own = {row["domain"]: row for row in rows if (row["method"], row["finetuned"]) == state}
        perplexities = [f"{own[name]['perplexity']:.1f}" if name in own else "" for name in sets]
        average = f"{macro[state]:.1f}" if state in macro else ""
        costs = [
            _amount(what, _mean(own, f"{phase}_{what}")) for phase in (GENERIC, "specialization") for what in COSTS
        ]
        lines.append([state[0], "yes" if state[1] else "no", *perplexities, average, *costs])
    return header, lines


def _mean(rows: Mapping[str, Mapping[str, Any]], key: str) -> float:
    values = [row[key] for name, row in rows.items() if name != GENERIC]
    return sum(values) / len(values)


def _amount(what: str, value: float) -> str:
    if what == "device_seconds":
        return f"{value:,.0f}"
    if what == "flops":
        return f"{value:.1e}"
    return f"{value / 1e6:.2f}M"
