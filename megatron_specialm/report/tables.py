"""Tables of results for the terminal and in Markdown; from `results.json` alone, of one run or of merged ones."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_specialm.base.terminal import Table
from megatron_specialm.config.text import GENERIC, size_name
from megatron_specialm.report.costs import COSTS, SPECIALIZATION

CAPPED = "*"  # behind a perplexity
CAPPED_SAYS = "ended by the cap on steps, not by early stopping"

SEEDS = ("seed", "training_seed")  # the columns by which runs of one config are told apart
Seeds = tuple[tuple[str, int], ...]


def seeds_of(entry: Mapping[str, Any]) -> Seeds:
    """What tells an entry from those of other runs: the names and values of the `SEEDS` that it has."""
    return tuple((name, entry[name]) for name in SEEDS if name in entry)


def results_table(results: Mapping[str, Any]) -> Table:
    """The paper's table: perplexities, then costs; specialization cost is the mean over domains. `fill` is the share of
    real tokens in the training's windows, which FLOPs are of as wholes.

    A line per method and state, and per stage and size where there are several. A model that all domains share is one
    line: it is the same for every size. Where the cap on steps ended a fine-tuning, its perplexity is marked.
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
        perplexities = [_perplexity(own[name]) if name in own else "" for name in sets]
        lines.append([*names, *perplexities, _average(results["macro"], stage, size, stage in shared), *_costs(own)])
    words = 2 + has_budgets + has_sizes
    marked = range(words, words + len(sets) + 1)
    return Table("Perplexity on held-out documents, and cost", header, _aligned(lines, marked), words, _note(rows))


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
    return _perplexity(max(own, key=lambda entry: entry["domains"])) if own else ""


def _perplexity(entry: Mapping[str, Any]) -> str:
    return _spread(entry, "perplexity", ".1f") + CAPPED * bool(entry.get("capped"))


def _aligned(lines: Sequence[Sequence[str]], columns: range) -> list[list[str]]:
    """Room where others of the column have the mark: digits stay below digits."""
    wide = [c for c in columns if any(line[c].endswith(CAPPED) for line in lines)]
    return [
        [f"{cell} " if c in wide and cell and not cell.endswith(CAPPED) else cell for c, cell in enumerate(line)]
        for line in lines
    ]


def _note(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the mark says, of which stages, and at which seeds where there are several; and how to be rid of it."""
    stages: dict[str, set[int]] = {}
    for row in rows:
        if row.get("capped"):
            stages.setdefault(row["stage"], set()).update(row.get("capped_seeds", ()))
    names = [
        f"{stage} (seeds {', '.join(map(str, sorted(seeds)))})" if seeds else stage for stage, seeds in stages.items()
    ]
    return f"{CAPPED} {CAPPED_SAYS}: allow more steps in {', '.join(names)}" if names else ""


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


def largest_budget(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the stage of each (method, fine-tuned) that cost most."""
    largest: dict[tuple[str, bool], Mapping[str, Any]] = {}
    for entry in sorted(entries, key=lambda entry: entry["total_flops_1"]):
        largest[entry["method"], is_tuned(entry)] = entry
    stages = {entry["stage"] for entry in largest.values()}
    return [entry for entry in entries if entry["stage"] in stages]


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
    seeds = varying(results["selection"])
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


def rates_table(results: Mapping[str, Any]) -> Table:
    """Of trainings that had a choice of learning rates: each one's best validation loss, and which was taken."""
    seeds = varying(results["learning_rates"])
    lines = [
        [
            entry["stage"], entry["domain"], *(str(entry[name]) for name in seeds), _taken(entry),
            f"{entry['learning_rate']:g}", _known(entry["validation_loss"], ".3f") or "not finite",
        ]
        for entry in results["learning_rates"]
    ]  # fmt: skip
    names = (name.replace("_", " ") for name in seeds)
    header = ["training", "domain", *names, "taken", "learning rate", "validation loss"]
    return Table("Choice of a learning rate", header, lines, 3 + len(seeds))


def varying(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The seeds that entries differ in; that of trainings only where it is not the other one."""
    own = [name for name in SEEDS if len({entry.get(name) for entry in entries}) > 1]
    are_one = all(entry.get("training_seed") == entry["seed"] for entry in entries)
    return own[:1] if are_one else own


def _taken(entry: Mapping[str, Any]) -> str:
    if entry["learning_rate"] != entry["choice"]:
        return ""
    return f"yes; {entry['untried']} not tried" if entry["untried"] else "yes"


def _known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
