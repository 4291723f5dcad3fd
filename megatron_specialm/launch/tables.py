"""Tables of results for the terminal, in Markdown and as CSV; from `results.json` alone, of one run or of merged ones."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_specialm.base.terminal import Table
from megatron_specialm.config.text import GENERIC, size_name
from megatron_specialm.launch.costs import COSTS, SPECIALIZATION

SEEDS = ("seed", "training_seed")  # the columns by which runs of one page are told apart


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row, with every column that any row has; nothing where a row lacks it."""
    columns = dict.fromkeys(key for row in rows for key in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def results_table(results: Mapping[str, Any]) -> Table:
    """The paper's table: perplexities, then costs; specialization cost is the mean over domains. `fill` is the share of
    real tokens in the training's windows, which FLOPs are of as wholes.

    A line per method and state, and per stage and size where there are several. A model that all domains share is one
    line: it is the same for every size.
    """
    rows = results["rows"]
    sets = list(dict.fromkeys(row["base_domain"] for row in rows))
    states = {(row["method"], _state(row), row["stage"]) for row in rows}
    has_budgets = len({state[:2] for state in states}) < len(states)
    has_sizes = any(row["size"] is not None for row in rows)
    shared = {row["stage"] for row in rows if row["domain"] == GENERIC}
    header = [
        "method", "fine-tuned", *["stage"] * has_budgets, *["set size"] * has_sizes, *sets, "macro",
        *(f"{phase} {what}" for phase in ("gen.", "spec.") for what in ("tokens", "FLOPs", "s")),
        "fill",
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        size = None if row["stage"] in shared else row["size"]
        group = (row["method"], _state(row), row["stage"], size)
        groups.setdefault(group, {})[row["base_domain"]] = row
    lines = []
    for (method, state, stage, size), own in groups.items():
        names = [method, state, *[stage] * has_budgets, *[_size(size)] * has_sizes]
        perplexities = [_spread(own[name], "perplexity", ".1f") if name in own else "" for name in sets]
        lines.append([*names, *perplexities, _average(results["macro"], stage, size, stage in shared), *_costs(own)])
    words = 2 + has_budgets + has_sizes
    return Table("Perplexity on held-out documents, and cost", header, lines, words)


def results_in_two(results: Mapping[str, Any]) -> tuple[Table, Table]:
    """Perplexities, and costs."""
    titles = (
        "Perplexity on held-out documents",
        "Cost: generic, for all domains together, and specialization, for each",
    )
    return results_table(results).in_two("gen. tokens", titles)


def _average(macro: Iterable[Mapping[str, Any]], stage: str, size: int | None, shared: bool) -> str:
    """A shared model's average is over as many domains as have a size."""
    own = [entry for entry in macro if entry["stage"] == stage and (shared or entry["size"] == size)]
    return _spread(max(own, key=lambda entry: entry["domains"]), "perplexity", ".1f") if own else ""


def _costs(own: Mapping[str, Mapping[str, Any]]) -> list[str]:
    of_domains = [row for name, row in own.items() if name != GENERIC]
    return [
        _amount(what, sum(row[f"{phase}_{what}"] for row in of_domains) / len(of_domains))
        for phase in (GENERIC, SPECIALIZATION)
        for what in COSTS
    ] + [_fill(of_domains)]


def _fill(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean over domains."""
    known = [row["fill"] for row in rows if row.get("fill") is not None]
    return f"{sum(known) / len(known):.0%}" if known else ""


def _amount(what: str, value: float) -> str:
    if what == "device_seconds":
        return f"{value:,.0f}"
    if what == "flops":
        return f"{value:.1e}"
    return f"{value / 1e6:.2f}M"


def is_tuned(entry: Mapping[str, Any]) -> bool:
    """Whether a model was fine-tuned: the domain's text that was only mixed into its pretraining does not make it so."""
    return entry["finetuned"] and entry.get("domain_text") != "mixed in"


def _state(entry: Mapping[str, Any]) -> str:
    return "yes" if is_tuned(entry) else "mixed in" if entry["finetuned"] else "no"


def _size(tokens: int | None) -> str:
    return "" if tokens is None else size_name(tokens)


def _spread(entry: Mapping[str, Any], key: str, form: str) -> str:
    """A value, and over seeds its sample standard deviation."""
    value = format(entry[key], form)
    return f"{value} ± {format(entry[f'{key}_sd'], form)}" if entry.get(f"{key}_sd") is not None else value


def concentration_table(results: Mapping[str, Any]) -> Table:
    """In how few clusters each set is (the paper's appendix): what one expert per cluster can serve."""
    lines = [
        [
            entry["stage"], entry["domain"], str(entry["k"]), f"{entry['windows']:,.0f}", _spread(entry, "top_share", ".2f"),
            _spread(entry, "entropy", ".2f"), _spread(entry, "effective_clusters", ".1f"),
        ]
        for entry in results["concentration"]
    ]  # fmt: skip
    header = ["assignment", "set", "k", "windows", "top share", "entropy (nats)", "effective clusters"]
    return Table("Concentration of each set in clusters", header, lines, 2)


def selection_table(results: Mapping[str, Any]) -> Table:
    """Which expert each criterion would take, where the one taken stands by it, and what it cost to tell, or would have."""
    seeds = [name for name in SEEDS if len({entry.get(name) for entry in results["selection"]}) > 1]
    lines = [
        [
            entry["stage"], entry["domain"], *(str(entry[name]) for name in seeds), entry["criterion"],
            "yes" if entry["criterion"] == entry["by"] else "", entry["criterion_choice"] or "not run", entry["choice"],
            _known(entry["rank"], ".0f"), _known(entry["tokens"], ",.0f"), _known(entry["flops"], ".1e"),
        ]
        for entry in results["selection"]
    ]  # fmt: skip
    header = [
        "selection", "domain", *(name.replace("_", " ") for name in seeds), "criterion", "decides", "its choice", "taken",
        "rank of taken", "tokens", "FLOPs",
    ]  # fmt: skip
    return Table("Choice of an expert", header, lines, 6 + len(seeds))


def _known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
