"""The results of one config at several seeds, as one: means, and how far the seeds spread.

A run is known by its `seed` and its `training_seed`. Runs of one `seed` have the same clusters, so that their concentration is
one sample, whatever their trainings' seeds.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json
from megatron_specialm.report.costs import fill
from megatron_specialm.report.results import COST_PREFIXES, any_capped, together
from megatron_specialm.report.rows import check_rows
from megatron_specialm.report.tables import SEEDS, Seeds, seeds_of, varying

# What a seed changes. Of the scores the spread is told too; of costs only the mean.
SCORES = ("nll", "perplexity", "top_share", "entropy", "effective_clusters")
CHOICES = ("selection", "learning_rates")
PARTS = {"rows": ("stage", "domain"), "macro": ("stage", "size"), "concentration": ("stage", "domain")}


def merge_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Merge the `results.json` of several run folders of one config.

    An entry is known by its stage and its set. Each score becomes its mean over the seeds that have it, and gets beside it
    `SCORE_sd`, the sample standard deviation (None for a single seed); costs become means; `seeds` lists the seeds, and
    `training_seeds` those of the trainings, in the same order. What is capped at any seed is `capped`, and `capped_seeds`
    lists at which. Selections and learning rates stand side by side: choices have no mean. Beside a score, rates that
    differ are text.

    Raises:
        ArtifactError: a file is missing or of an earlier version, of another config, or of seeds that came before.
    """
    return merge_seeds(read_runs(paths))


def read_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Those files one behind the other, with the same errors: each entry says which seed it is of."""
    runs = [_read(path) for path in paths]
    seeds: dict[Seeds, Path] = {}
    for path, run in zip(paths, runs, strict=True):
        if run["pipeline"] != runs[0]["pipeline"]:
            raise ArtifactError(
                f"{path}: of {run['pipeline']!r}, and {paths[0]} of {runs[0]['pipeline']!r}: merge runs of one config"
            )
        for own in set(map(seeds_of, run["rows"])):
            if own in seeds:
                raise ArtifactError(
                    f"{path}: {' and '.join(f'{name} {value}' for name, value in own)} are those of {seeds[own]} too: give "
                    "each run another `training_seed` or `seed`"
                )
            seeds[own] = path
    parts = [part for part in runs[0] if part != "pipeline"]
    entries = {part: [entry for run in runs for entry in run.get(part, ())] for part in parts}
    return {"pipeline": runs[0]["pipeline"], **entries}


def merge_seeds(results: Mapping[str, Any]) -> dict[str, Any]:
    """Merge as `merge_runs` does what `read_runs` or `results_from_rows` has given."""
    return {**results, **{part: _merge(results[part], by) for part, by in PARTS.items() if part in results}}


@dataclass(frozen=True)
class _Entry:
    seed: int


@dataclass(frozen=True)
class _Row(_Entry):
    method: str
    stage: str
    domain: str
    base_domain: str
    finetuned: bool


@dataclass(frozen=True)
class _Average(_Entry):
    stage: str
    size: int | None
    perplexity: float


@dataclass(frozen=True)
class _Concentration(_Entry):
    stage: str
    domain: str


@dataclass(frozen=True)
class _Results:
    """What `report/results.py` writes in any case; `check_rows` looks at the other columns of rows."""

    pipeline: str
    rows: list[_Row]
    macro: list[_Average]
    concentration: list[_Concentration]
    selection: list[_Entry]
    learning_rates: list[_Entry]


def _read(path: Path) -> dict[str, Any]:
    remedy = "damaged, or of an earlier version: write it again with `specialm results` of its config"
    read_json(path, _Results, remedy=remedy)
    results = read_json(path, dict[str, Any])
    check_rows(path, results["rows"], remedy=remedy)
    for entry in (*results["rows"], *results["macro"], *results["selection"], *results["learning_rates"]):
        entry.setdefault("training_seed", entry["seed"])  # in earlier versions they were one
    return results


def _merge(entries: Sequence[Mapping[str, Any]], by: tuple[str, ...]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], dict[Seeds, Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in by), {})[seeds_of(entry)] = entry
    return [_summary([group[seeds] for seeds in sorted(group)]) for group in groups.values()]


def _summary(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One entry for those of all seeds."""
    first = {key: value for key, value in own[0].items() if key not in SEEDS}
    scores = {key: [entry[key] for entry in own] for key in SCORES if key in first}
    costs = {key: [entry[key] for entry in own] for key in first if key.startswith(COST_PREFIXES)}
    return {
        **first,
        **({"learning_rate": together(entry["learning_rate"] for entry in own)} if "learning_rate" in first else {}),
        **{key: statistics.fmean(values) for key, values in (scores | costs).items()},
        **({"fill": fill({key: statistics.fmean(values) for key, values in costs.items()})} if "fill" in first else {}),
        **{f"{key}_sd": statistics.stdev(values) if len(values) > 1 else None for key, values in scores.items()},
        **(_capped(own) if any("capped" in entry for entry in own) else {}),
        **{f"{name}s": [entry[name] for entry in own] for name in SEEDS if name in own[0]},
    }


def _capped(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "capped": any_capped(own),
        "capped_seeds": [entry[(varying(own) or SEEDS)[0]] for entry in own if entry.get("capped")],
    }
