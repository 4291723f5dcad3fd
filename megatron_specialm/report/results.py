"""What came out: `results.json`, `results.csv`, `results.md` and `ledger.json`, made from the completion markers.

    rows            per model and set of text: perplexity, and what the model cost
    macro           per (method, fine-tuned, stage, size of the domains' training sets): the average over those domains
    concentration   per assign stage and set: in how few clusters it is
    selection       per select stage, domain and criterion: which expert, and what choosing it cost
    learning_rates  per training that had a choice of them, and rate: its best validation loss, and which was taken

`finetuned` says that a model has read its domain's own text, `domain_text` how: mixed into its pretraining, or fine-tuned on
it. Stages of one method are its budgets. A domain with `sizes` is one set per size; `base_domain` is what it is a size of.
`capped` says whether the cap on steps, not early stopping, ended the model's own fine-tuning; null where that is not asked.
"""

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_specialm.base.artifacts import Marker, artifact_folder, read_marker
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.files import write_json, write_text
from megatron_specialm.base.lock import hold_folder
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import domain_text, is_finetuned, method_of, sources
from megatron_specialm.graph.plan import RESOLVED, PlannedTask, make_plan
from megatron_specialm.graph.rates import beyond
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import Task, TaskId, ancestors, model_task
from megatron_specialm.report.costs import fill, ledger_entries, model_cost
from megatron_specialm.report.rows import to_csv
from megatron_specialm.report.tables import results_table, seeds_of

logger = logging.getLogger(__name__)

COST_PREFIXES = ("generic_", "specialization_", "total_")


def write_results(
    pipeline: Pipeline, root: Path, *, plan: Mapping[TaskId, PlannedTask] | None = None, must_write: bool = True
) -> dict[str, Any]:
    """Collect what has been evaluated so far; writes the files named above and returns the content of `results.json`.

    Only artifacts that are current count: a number made from other settings or text is never shown beside new ones.

    Args:
        plan: of the folder as it is now, where there is one already.
        must_write: False for one who only looks, and does not hold the run folder: that another command does, or that it cannot
            be written to, is a warning.
    """
    plan = make_plan(pipeline, root) if plan is None else plan
    graph = {name: planned.task for name, planned in plan.items()}
    markers = {
        name: marker
        for name, planned in plan.items()
        if planned.state == "done" and (marker := read_marker(artifact_folder(root, *name, planned.digest))) is not None
    }
    rows = [row for name in markers for row in _rows(pipeline, graph, markers, name)]
    results = {
        "pipeline": pipeline.name,
        "rows": rows,
        "macro": _macro(rows, {name: files.train_tokens for name, files in pipeline.text.domains.items()}),
        "concentration": _concentration(pipeline, markers),
        "selection": _selection(pipeline, markers),
        "learning_rates": _learning_rates(pipeline, markers),
    }
    if not must_write and not (root / RESOLVED).exists():  # no run folder yet: who looks makes none
        return results
    ledger = [entry for name, marker in markers.items() for entry in ledger_entries(graph[name], marker)]
    try:
        with contextlib.nullcontext() if must_write else hold_folder(root):
            write_json(root / "ledger.json", ledger)
            write_json(root / "results.json", results)
            if rows:
                write_text(root / "results.csv", to_csv(rows))
                write_text(root / "results.md", results_table(results).markdown())
    except (OSError, MachineError) as error:
        if must_write:
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        logger.warning("warning: %s is not brought up to date: %s", root / "results.json", reason)
    return results


def results_from_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows, of one run or of several seeds, with the averages that follow from them: what tables of perplexity and cost are
    made of. The domains are those that rows name."""
    sizes = {row["domain"]: row["size"] for row in rows if row["domain"] != GENERIC}
    return {"rows": rows, "macro": _macro(rows, sizes)}


def _rows(
    pipeline: Pipeline, graph: Mapping[TaskId, Task], markers: Mapping[TaskId, Marker], name: TaskId
) -> list[dict[str, Any]]:
    """One row per set that an evaluate task has scored; none where something that the model rests on is gone, for then
    its cost cannot be told."""
    model = model_task(name.key) if kind_of(pipeline.stages[name.stage]).makes == "perplexity" else None
    if model is None or not markers.keys() >= set(ancestors(graph, model)):
        return []
    values = markers[name].values
    cost = model_cost(pipeline, graph, markers, model)
    return [
        {
            "method": method_of(pipeline, model.stage),
            "stage": model.stage,
            **_set_columns(pipeline, source),
            "finetuned": is_finetuned(pipeline, model.stage),
            "domain_text": domain_text(pipeline, model.stage),
            "capped": markers[model].values.get("capped"),
            "nll": score["nll"],
            "perplexity": math.exp(score["nll"]),
            "tokens_evaluated": score["tokens"],
            "learning_rate": markers[model].values.get("learning_rate"),  # None of a selection, which trains nothing
            **cost,
            "inference_parameters": values["parameters"],
            **_seeds(pipeline),
            "model": str(model),
        }
        for source, score in values["sets"].items()
    ]


def _set_columns(pipeline: Pipeline, source: str) -> dict[str, Any]:
    """A set's key, the domain it is a size of (itself, where there are no sizes), and the size in training tokens."""
    files = pipeline.text.domains.get(source)  # None for the generic set
    if files is None:
        return {"domain": source, "base_domain": source, "size": None}
    return {"domain": source, "base_domain": files.domain or source, "size": files.train_tokens}


def _seeds(pipeline: Pipeline) -> dict[str, int]:
    """Of what rests on trainings; clusters have the first alone."""
    return {"seed": pipeline.seed, "training_seed": pipeline.seed_of_training}


def _macro(rows: Iterable[Mapping[str, Any]], sizes: Mapping[str, int | None]) -> list[dict[str, Any]]:
    """exp of the mean over domains of the mean nll per token: neither a mean of perplexities nor weighted by tokens.

    The domains are all those of one size, and the costs the means over them; no average where one has not been scored.

    Args:
        sizes: of each domain there is, the number of its training tokens; None without `sizes` or `train_tokens`.
    """
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["domain"] != GENERIC:
            group = (row["method"], row["finetuned"], row["stage"], row["size"], seeds_of(row))
            groups.setdefault(group, {})[row["domain"]] = row
    entries = []
    for (method, finetuned, stage, size, _), own in groups.items():
        domains = [name for name, tokens in sizes.items() if tokens == size]
        if own.keys() < set(domains):
            continue
        any_row = own[domains[0]]
        costs = {key: _mean(row[key] for row in own.values()) for key in any_row if key.startswith(COST_PREFIXES)}
        entries.append(
            {
                "method": method,
                "finetuned": finetuned,
                "domain_text": any_row["domain_text"],
                "stage": stage,
                "size": size,
                "domains": len(domains),
                "capped": any_capped(own.values()),
                "perplexity": math.exp(_mean(row["nll"] for row in own.values())),
                "learning_rate": together(row.get("learning_rate") for row in own.values()),
                **costs,
                "fill": fill(costs),
                "devices": any_row["devices"],
                "inference_parameters": any_row["inference_parameters"],
                **dict(seeds_of(any_row)),
            }
        )
    return entries


def any_capped(entries: Iterable[Mapping[str, Any]]) -> bool | None:
    """Whether any of them is; None where it is asked of none."""
    known = [entry["capped"] for entry in entries if entry.get("capped") is not None]
    return any(known) if known else None


def together(values: Iterable[float | str | None]) -> float | str | None:
    """One value for several entries: theirs, or as text those that differ, of which some may be such text."""
    different = list(dict.fromkeys(values))
    if len(different) == 1:
        return different[0]
    return ", ".join(dict.fromkeys(part for value in different for part in str(value).split(", ")))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _concentration(pipeline: Pipeline, markers: Mapping[TaskId, Marker]) -> list[dict[str, Any]]:
    return [
        {"stage": name.stage, **_set_columns(pipeline, name.key), **marker.values, "seed": pipeline.seed}
        for name, marker in markers.items()
        if kind_of(pipeline.stages[name.stage]).makes == "assignment" and name.key in sources(pipeline)
    ]


def _selection(pipeline: Pipeline, markers: Mapping[TaskId, Marker]) -> list[dict[str, Any]]:
    """Of every criterion that a selection has tried: its own choice, and where the expert taken stands by it."""
    return [
        {
            "method": method_of(pipeline, name.stage),
            "stage": name.stage,
            **_set_columns(pipeline, name.key),
            "choice": marker.values["choice"],
            "by": marker.values["by"],
            "criterion": criterion,
            "criterion_choice": told["choice"],
            **{key: told.get(key) for key in ("rank", "tokens", "slots", "flops", "seconds")},
            **_seeds(pipeline),
        }
        for name, marker in markers.items()
        for criterion, told in marker.values.get("criteria", {}).items()
    ]


def _learning_rates(pipeline: Pipeline, markers: Mapping[TaskId, Marker]) -> list[dict[str, Any]]:
    return [
        {
            "method": method_of(pipeline, name.stage),
            "stage": name.stage,
            **_set_columns(pipeline, name.key),
            "choice": (choice := marker.values["chosen_rate"]),
            "untried": beyond(choice, [float(rate) for rate in losses]),
            "learning_rate": float(rate),
            "validation_loss": loss,
            **_seeds(pipeline),
        }
        for name, marker in markers.items()
        for losses in [marker.values.get("learning_rates", {})]
        for rate, loss in losses.items()
    ]
