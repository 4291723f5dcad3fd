"""The results of one config at several seeds, as one: means, and how far the seeds spread.

`seed` and `training_seed` identify a run. Runs of one `seed` have the same clusters, so their concentration is one sample,
whatever their training seeds are.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.base.files import read_json
from megatron_specialm.report.rows import SEEDS, Average, E, Results, Row, Seeds, Spread, combine, rules, varying


def read_runs(paths: Sequence[Path]) -> Results:
    """The entries of the `results.json` of several run folders of one config, concatenated. The seeds are columns of each
    entry.

    Raises:
        ArtifactError: a file is missing, of an earlier version, of another config, or has the seeds of a file before it.
    """
    remedy = "damaged, or of an earlier version: write it again with `specialm results` of its config"
    runs = [read_json(path, Results, remedy=remedy) for path in paths]
    seeds: dict[Seeds, Path] = {}
    for path, run in zip(paths, runs, strict=True):
        if run.pipeline != runs[0].pipeline:
            raise ArtifactError(
                f"{path}: of the config {run.pipeline!r}, and {paths[0]} of {runs[0].pipeline!r}: merge runs of one config"
            )
        for own in {row.seeds for row in run.rows}:
            if own in seeds:
                raise ArtifactError(
                    f"{path}: {' and '.join(f'{name} {value}' for name, value in own)} are those of {seeds[own]} too: give "
                    "each run another `training_seed` or `seed`"
                )
            seeds[own] = path
    parts = [part for part in vars(runs[0]) if part != "pipeline"]
    return Results(runs[0].pipeline, **{part: [entry for run in runs for entry in vars(run)[part]] for part in parts})


def merge_seeds(results: Results) -> Results:
    """Merge the entries of the same stage and set, as `read_runs` and `results_from_rows` return them.

    Scores and costs become means over seeds, and `spread` has the sample standard deviations of scores. An entry that is
    capped at any seed is `capped`; learning rates that differ are listed as text. Selections and learning rates stay as they
    are: choices have no mean.
    """
    return replace(
        results,
        rows=_merge(results.rows, lambda row: (row.stage, row.domain)),
        macro=_merge(results.macro, lambda average: (average.stage, average.size)),
        concentration=_merge(results.concentration, lambda entry: (entry.stage, entry.domain)),
    )


def _merge(entries: Sequence[E], by: Callable[[E], Any]) -> list[E]:
    groups: dict[Any, dict[Seeds, E]] = {}
    for entry in entries:
        groups.setdefault(by(entry), {})[entry.seeds] = entry
    return [_summary([group[seeds] for seeds in sorted(group)]) for group in groups.values()]


def _summary(own: Sequence[E]) -> E:
    """One entry for those of all seeds."""
    kind: Any = type(own[0])
    values = {name: [getattr(entry, name) for entry in own] for name, rule in rules(kind).items() if rule.is_score}
    spread = Spread(
        deviation={name: _deviation(each) for name, each in values.items()},
        seeds={name: [getattr(entry, name) for entry in own] for name in SEEDS if hasattr(own[0], name)},
        capped_seeds=_capped_seeds(own) if issubclass(kind, Row | Average) else None,
    )
    merged: E = combine(kind, own, average=statistics.fmean, spread=spread)
    return merged


def _deviation(values: Sequence[Any]) -> float | None:
    """The sample standard deviation; None of a single value, or where one is unknown."""
    return None if len(values) < 2 or None in values else statistics.stdev(values)


def _capped_seeds(own: Sequence[Any]) -> list[int]:
    name = (varying(own) or SEEDS)[0]
    return [getattr(entry, name) for entry in own if entry.capped]
