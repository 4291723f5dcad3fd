"""`results.json`, `results.csv`, `results.md` and `ledger.json`, made from the completion markers.

`report/rows.py` has the columns.
"""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_specialm.base.artifacts import Marker, artifact_folder, read_marker
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.files import write_json, write_text
from megatron_specialm.base.lock import hold_folder
from megatron_specialm.config.finetuning import Capped, capped_warning
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.text import GENERIC
from megatron_specialm.graph.lineage import domain_text, imported_models, is_finetuned, method_of, sources, train_stages
from megatron_specialm.graph.plan import RESOLVED, Plan, make_plan
from megatron_specialm.graph.rates import beyond
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import Task, TaskId, ancestors, model_task
from megatron_specialm.report.costs import ledger_entries, model_cost
from megatron_specialm.report.coverage import relative_distances
from megatron_specialm.report.rows import (
    Average,
    Concentration,
    LearningRate,
    Results,
    Row,
    Selection,
    combine,
    mean,
    to_csv,
)
from megatron_specialm.report.tables import results_table

logger = logging.getLogger(__name__)


def write_results(pipeline: Pipeline, root: Path, *, plan: Plan | None = None, must_write: bool = True) -> Results:
    """Collect what has been evaluated so far, write these files, and return the results.

    Only current artifacts count: numbers of other settings or other text are never shown beside new ones.

    Args:
        plan: of the run folder as it is now; default: it is made.
        must_write: False for a command that does not hold the run folder's lock: if the folder is locked or not writable, that
            is a warning, not an error.
    """
    plan = make_plan(pipeline, root) if plan is None else plan
    graph = {name: planned.task for name, planned in plan.items()}
    markers = {
        name: marker
        for name, planned in plan.items()
        if planned.state == "done" and (marker := read_marker(artifact_folder(root, *name, planned.digest))) is not None
    }
    rows = [row for name in markers for row in _rows(pipeline, graph, markers, name)]
    results = Results(
        pipeline=pipeline.name,
        rows=rows,
        macro=list(_averages(rows, {name: files.train_tokens for name, files in pipeline.text.domains.items()})),
        concentration=list(_concentration(pipeline, markers, relative_distances(pipeline, plan, root))),
        selection=list(_selection(pipeline, markers)),
        learning_rates=list(_learning_rates(pipeline, markers)),
    )
    if not must_write and not (root / RESOLVED).exists():  # a command that only reads creates no run folder
        return results
    ledger = [entry for name, marker in markers.items() for entry in ledger_entries(graph[name], marker)]
    try:
        with contextlib.nullcontext() if must_write else hold_folder(root):
            write_json(root / "ledger.json", ledger)
            results.write(root / "results.json")
            if rows:
                write_text(root / "results.csv", to_csv(row.columns() for row in rows))
                write_text(root / "results.md", results_table(results).markdown())
    except (OSError, MachineError) as error:
        if must_write:
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        logger.warning("%s was not updated: %s", root / "results.json", reason)
    return results


def results_from_rows(rows: Sequence[Row]) -> Results:
    """Rows, of one run or of several seeds, with their averages: all that tables of perplexity and cost need. The domains are
    those of the rows."""
    sizes = {row.domain: row.size for row in rows if row.domain != GENERIC}
    return Results("", list(rows), list(_averages(rows, sizes)), [], [], [])


def _rows(
    pipeline: Pipeline, graph: Mapping[TaskId, Task], markers: Mapping[TaskId, Marker], name: TaskId
) -> Iterator[Row]:
    """A row per set that an evaluate task has scored; no row if the marker of a task that the model depends on is missing,
    because its cost is unknown then."""
    model = model_task(name.key) if kind_of(pipeline.stages[name.stage]).makes == "perplexity" else None
    if model is None or not markers.keys() >= set(ancestors(graph, model)):
        return
    for source, score in markers[name].values["sets"].items():
        yield Row(
            method=method_of(pipeline, model.stage),
            stage=model.stage,
            **_set_columns(pipeline, source),
            finetuned=is_finetuned(pipeline, model.stage),
            domain_text=domain_text(pipeline, model.stage),
            capped=markers[model].values.get("capped"),
            nll=score["nll"],
            perplexity=math.exp(score["nll"]),
            tokens_evaluated=score["tokens"],
            **_per_byte(score),
            learning_rate=markers[model].values.get("learning_rate"),  # None of a selection, which trains nothing
            **model_cost(pipeline, graph, markers, model),
            inference_parameters=markers[name].values["parameters"],
            inference_active_parameters=markers[name].values.get("active_parameters"),
            **_seeds(pipeline),
            model=str(model),
            imported=", ".join(imported_models(pipeline, model.stage)),
        )


def _per_byte(score: Mapping[str, Any]) -> dict[str, Any]:
    """Of a set's score: bits per byte of its text. Nothing where the bytes are unknown."""
    if "bytes" not in score:
        return {}
    return {
        "bits_per_byte": score["nats"] / math.log(2) / score["bytes"],
        "bytes_evaluated": score["bytes"],
        "bytes_estimated": score["bytes_estimated"],
    }


def _set_columns(pipeline: Pipeline, source: str) -> dict[str, Any]:
    """A set's key, the domain that it is a size of (itself, without sizes), and the size in training tokens."""
    files = pipeline.text.domains.get(source)  # None for the generic set
    if files is None:
        return {"domain": source, "base_domain": source, "size": None}
    return {"domain": source, "base_domain": files.domain or source, "size": files.train_tokens}


def _seeds(pipeline: Pipeline) -> dict[str, Any]:
    """The seeds of entries that depend on trainings; clusters depend on the first one only."""
    return {"seed": pipeline.seed, "training_seed": pipeline.seed_of_training}


def _averages(rows: Iterable[Row], sizes: Mapping[str, int | None]) -> Iterator[Average]:
    """Per (method, fine-tuned, stage, size): exp of the mean over domains of the mean nll per token. It is neither a mean of
    perplexities nor weighted by tokens. There is none if a domain of that size has not been scored.

    Args:
        sizes: the training tokens of each domain of the config; None without `sizes` or `train_tokens`.
    """
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row.domain != GENERIC:
            group = (row.method, row.finetuned, row.stage, row.size, row.seeds)
            groups.setdefault(group, {})[row.domain] = row
    for (_, _, _, size, _), own in groups.items():
        domains = [name for name, tokens in sizes.items() if tokens == size]
        if own.keys() >= set(domains):
            perplexity = math.exp(mean([row.nll for row in own.values()]))
            yield combine(Average, list(own.values()), domains=len(domains), perplexity=perplexity)


def _concentration(
    pipeline: Pipeline, markers: Mapping[TaskId, Marker], distances: Mapping[TaskId, float]
) -> Iterator[Concentration]:
    for name, marker in markers.items():
        if kind_of(pipeline.stages[name.stage]).makes == "assignment" and name.key in sources(pipeline):
            place = _set_columns(pipeline, name.key)
            yield Concentration(
                stage=name.stage, **place, **marker.values, relative_distance=distances.get(name), seed=pipeline.seed
            )


def _selection(pipeline: Pipeline, markers: Mapping[TaskId, Marker]) -> Iterator[Selection]:
    """For every criterion that a selection tried: its choice, and the rank of the expert taken."""
    for name, marker in markers.items():
        for criterion, result in marker.values.get("criteria", {}).items():
            yield Selection(
                method=method_of(pipeline, name.stage),
                stage=name.stage,
                **_set_columns(pipeline, name.key),
                choice=marker.values["choice"],
                by=marker.values["by"],
                criterion=criterion,
                criterion_choice=result["choice"],
                **{key: result.get(key) for key in ("rank", "tokens", "slots", "flops", "seconds")},
                **_seeds(pipeline),
            )


def _learning_rates(pipeline: Pipeline, markers: Mapping[TaskId, Marker]) -> Iterator[LearningRate]:
    for name, marker in markers.items():
        losses = marker.values.get("learning_rates", {})
        for rate, loss in losses.items():
            choice = marker.values["chosen_rate"]
            yield LearningRate(
                method=method_of(pipeline, name.stage),
                stage=name.stage,
                **_set_columns(pipeline, name.key),
                choice=choice,
                untried=beyond(choice, [float(tried) for tried in losses]),
                learning_rate=float(rate),
                validation_loss=loss,
                **_seeds(pipeline),
            )


def capped_warnings(pipeline: Pipeline, plan: Plan, root: Path) -> list[str]:
    """A warning for each stage with finished models whose fine-tuning was ended by the cap on steps instead of early stopping.
    Trials at other learning rates are left out: their logs have the warning."""
    warnings = []
    for name, stage in train_stages(pipeline).items():
        found = []
        for task, planned in plan.items():
            wanted = task.stage == name and planned.task.rate is None
            marker = read_marker(artifact_folder(root, *task, planned.digest)) if wanted else None
            if marker and marker.values.get("capped"):
                found.append(Capped(task.key, marker.values["steps"], marker.values["best_step"]))
        if found:
            warnings.append(capped_warning(name, stage, found))
    return warnings
