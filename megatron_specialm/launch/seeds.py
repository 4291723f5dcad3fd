"""The results of one page at several seeds, as one: means, and how far the seeds spread."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json
from megatron_specialm.launch.costs import fill
from megatron_specialm.launch.results import COST_PREFIXES, together

# What a seed changes. Of the scores the spread is told too; of costs only the mean.
SCORES = ("nll", "perplexity", "top_share", "entropy", "effective_clusters")
CHOICES = ("selection", "learning_rates")
PARTS = {"rows": ("stage", "domain"), "macro": ("stage", "size"), "concentration": ("stage", "domain")}


def merge_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """Merge the `results.json` of several run folders of one page.

    An entry is known by its stage and its set. Each score becomes its mean over the seeds that have it, and gets beside it
    `SCORE_sd`, the sample standard deviation (None for a single seed); costs become means; `seeds` lists the seeds.
    Selections and learning rates stand side by side: choices have no mean. Beside a score, rates that differ are text.

    Raises:
        ArtifactError: a file is missing or of an earlier version, of another page, or of a seed that came before.
    """
    runs = [_read(path) for path in paths]
    seeds: dict[int, Path] = {}
    for path, run in zip(paths, runs, strict=True):
        if run["pipeline"] != runs[0]["pipeline"]:
            raise ArtifactError(
                f"{path}: of the page {run['pipeline']!r}, and {paths[0]} of {runs[0]['pipeline']!r}: merge runs of one page"
            )
        for seed in {row["seed"] for row in run["rows"]}:
            if seed in seeds:
                raise ArtifactError(f"{path}: seed {seed} is that of {seeds[seed]} too: give each run another `seed`")
            seeds[seed] = path
    merged = {part: _merge([entry for run in runs for entry in run[part]], by) for part, by in PARTS.items()}
    choices = {part: [entry for run in runs for entry in run[part]] for part in CHOICES}
    return {"pipeline": runs[0]["pipeline"], **merged, **choices}


def _read(path: Path) -> dict[str, Any]:
    results = read_json(path)
    if not {*PARTS, *CHOICES} <= results.keys():
        raise ArtifactError(f"{path}: of an earlier version: write it again with `specialm results` of its page")
    return results


def _merge(entries: Sequence[Mapping[str, Any]], by: tuple[str, ...]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in by), {})[entry["seed"]] = entry
    return [_summary(list(group.values())) for group in groups.values()]


def _summary(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One entry for those of all seeds."""
    first = {key: value for key, value in own[0].items() if key != "seed"}
    scores = {key: [entry[key] for entry in own] for key in SCORES if key in first}
    costs = {key: [entry[key] for entry in own] for key in first if key.startswith(COST_PREFIXES)}
    return {
        **first,
        **({"learning_rate": together(entry["learning_rate"] for entry in own)} if "learning_rate" in first else {}),
        **{key: statistics.fmean(values) for key, values in (scores | costs).items()},
        **({"fill": fill({key: statistics.fmean(values) for key, values in costs.items()})} if "fill" in first else {}),
        **{f"{key}_sd": statistics.stdev(values) if len(values) > 1 else None for key, values in scores.items()},
        "seeds": sorted(entry["seed"] for entry in own),
    }
