"""Tables of results, for the terminal and for Markdown; from `Results` alone, of one run or of several."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megatron_specialm.base.terminal import Column, Table, number, word
from megatron_specialm.config.text import GENERIC, size_name
from megatron_specialm.report.costs import COSTS
from megatron_specialm.report.rows import (
    SPECIALIZATION,
    Average,
    Concentration,
    Entry,
    LearningRate,
    Results,
    Row,
    Selection,
    varying,
)

CAPPED = "*"  # behind a perplexity
IMPORTED = "†"  # behind a method
CAPPED_MEANS = "ended by the cap on steps, not by early stopping"
COST_COLUMNS = [(phase, what) for phase in (GENERIC, SPECIALIZATION) for what in COSTS]
HEADINGS = {GENERIC: "gen.", SPECIALIZATION: "spec.", "tokens": "tokens", "flops": "FLOPs", "device_seconds": "s"}
Scored = TypeVar("Scored", Row, Average)


@dataclass(frozen=True)
class _Line:
    """A method in a state, of a stage and a size: its rows by `base_domain`, and their average if there is one."""

    method: str
    state: str
    stage: str
    size: int | None
    rows: Mapping[str, Row]
    average: Average | None

    @property
    def of_domains(self) -> list[Row]:
        return [row for name, row in self.rows.items() if name != GENERIC]


def results_table(results: Results) -> Table:
    """The paper's table: perplexities, then costs; specialization cost is the mean over domains. `fill` is the fraction of real
    tokens in the slots of trainings; FLOPs are of all slots.

    A line per method and state, and per stage and size if there are several. A model for all domains has one line: it is the
    same for every size. The perplexity of a fine-tuning that the cap on steps ended is marked. Bits per byte, which compare
    models of different tokenizers, are means over domains.
    """
    lines = _lines(results)
    sets = list(dict.fromkeys(row.base_domain for row in results.rows))
    states = {(row.method, _state(row), row.stage) for row in results.rows}
    has_budgets = len({state[:2] for state in states}) < len(states)
    has_sizes = any(row.size is not None for row in results.rows)
    words: list[Column[_Line]] = [word("method", _method), word("fine-tuned", lambda line: line.state)]
    if has_budgets:
        words.append(word("stage", lambda line: line.stage))
    if has_sizes:
        words.append(word("set size", lambda line: "" if line.size is None else size_name(line.size)))
    macro: Column[_Line] = number("macro", lambda line: _perplexity(line.average))
    fill: Column[_Line] = number("fill", lambda line: _mean_fill(line.of_domains))
    knows_bytes = any(row.bits_per_byte is not None for row in results.rows)
    per_byte: Column[_Line] = number("bits/byte", lambda line: _bits_per_byte(line.average))
    scores = [*map(_score_column, sets), macro, *([per_byte] if knows_bytes else [])]
    note = "; ".join(filter(None, (_note(results.rows), _note_of_imports(results.rows))))
    columns = [*words, *scores, *itertools.starmap(_cost_column, COST_COLUMNS), fill]
    table = Table.of(lines, columns, title="Perplexity on held-out documents, and cost", note=note)
    return replace(table, lines=_aligned(table.lines, range(len(words), len(words) + len(scores))))


def _lines(results: Results) -> list[_Line]:
    shared = {row.stage for row in results.rows if row.domain == GENERIC}
    groups: dict[tuple[str, str, str, int | None], dict[str, Row]] = {}
    for row in results.rows:
        group = (row.method, _state(row), row.stage, None if row.stage in shared else row.size)
        groups.setdefault(group, {})[row.base_domain] = row
    lines = []
    for (method, state, stage, size), own in groups.items():
        averages = [one for one in results.macro if one.stage == stage and (stage in shared or one.size == size)]
        # A shared model's average is over as many domains as have a size.
        average = max(averages, key=lambda one: one.domains, default=None)
        lines.append(_Line(method, state, stage, size, own, average))
    return lines


def results_in_two(results: Results) -> tuple[Table, Table]:
    """Perplexities, and costs."""
    titles = (
        "Perplexity on held-out documents",
        "Cost: generic, for all domains together, and specialization, for each",
    )
    return results_table(results).in_two("gen. tokens", titles)


def _method(line: _Line) -> str:
    return line.method + f" {IMPORTED}" * any(row.imported for row in line.rows.values())


def _score_column(name: str) -> Column[_Line]:
    return number(name, lambda line: _perplexity(line.rows.get(name)))


def _cost_column(phase: str, what: str) -> Column[_Line]:
    return number(f"{HEADINGS[phase]} {HEADINGS[what]}", lambda line: _mean_cost(line.of_domains, phase, what))


def _perplexity(entry: Row | Average | None) -> str:
    return "" if entry is None else _with_deviation(entry, "perplexity", ".1f") + CAPPED * bool(entry.capped)


def _bits_per_byte(average: Average | None) -> str:
    if average is None:
        return ""
    return "-" if average.bits_per_byte is None else _with_deviation(average, "bits_per_byte", ".3f")


def _aligned(lines: Sequence[Sequence[str]], columns: range) -> list[list[str]]:
    """Pad the cells of columns with the mark, so that digits are below digits."""
    wide = [c for c in columns if any(line[c].endswith(CAPPED) for line in lines)]
    return [
        [f"{cell} " if c in wide and cell and not cell.endswith(CAPPED) else cell for c, cell in enumerate(line)]
        for line in lines
    ]


def _note(rows: Sequence[Row]) -> str:
    """The meaning of the mark, and the stages whose steps to raise, with the seeds if there are several; and whether bits per
    byte are estimates."""
    stages: dict[str, set[int]] = {}
    for row in rows:
        if row.capped:
            seeds = (row.spread and row.spread.capped_seeds) or ()
            stages.setdefault(row.stage, set()).update(seeds)
    names = [
        f"{stage} (seeds {', '.join(map(str, sorted(seeds)))})" if seeds else stage for stage, seeds in stages.items()
    ]
    notes = [f"{CAPPED} {CAPPED_MEANS}: allow more steps in {', '.join(names)}"] if names else []
    if any(row.bytes_estimated for row in rows):
        notes.append("bits/byte: estimated, as max_windows left a part of a set out")
    return "; ".join(notes)


def _note_of_imports(rows: Iterable[Row]) -> str:
    """The meaning of the mark at methods with an imported model, whose training the costs do not have."""
    names = dict.fromkeys(row.imported for row in rows if row.imported)
    return f"{IMPORTED} without the cost of training an existing model ({', '.join(names)})" if names else ""


def _mean_cost(rows: Sequence[Row], phase: str, what: str) -> str:
    value = sum(row.cost(phase, what) for row in rows) / len(rows)
    if what == "device_seconds":
        return f"{value:,.0f}"
    return f"{value:.1e}" if what == "flops" else f"{value / 1e6:.2f}M"


def _mean_fill(rows: Sequence[Row]) -> str:
    known = [row.fill for row in rows if row.fill is not None]
    return f"{sum(known) / len(known):.0%}" if known else ""


def is_tuned(entry: Row | Average) -> bool:
    """Whether a model was fine-tuned, and not only pretrained with some of the domain's text mixed in."""
    return entry.finetuned and entry.domain_text != "mixed in"


def largest_budget(entries: Sequence[Scored]) -> list[Scored]:
    """The entries of the most expensive stage of each (method, fine-tuned)."""
    largest: dict[tuple[str, bool], str] = {}
    for entry in sorted(entries, key=lambda entry: entry.total_flops_1):
        largest[entry.method, is_tuned(entry)] = entry.stage
    return [entry for entry in entries if entry.stage in largest.values()]


def _state(entry: Row) -> str:
    return "yes" if is_tuned(entry) else "mixed in" if entry.finetuned else "no"


def _with_deviation(entry: Entry, score: str, form: str) -> str:
    """A value, and over seeds its sample standard deviation."""
    value = format(getattr(entry, score), form)
    deviation = entry.spread.deviation[score] if entry.spread else None
    return value if deviation is None else f"{value} ± {format(deviation, form)}"


def concentration_table(results: Results) -> Table:
    """How concentrated each set is in clusters (the paper's appendix): what one expert per cluster can serve."""
    columns: list[Column[Concentration]] = [
        word("assignment", lambda entry: entry.stage),
        word("set", lambda entry: entry.domain),
        number("k", lambda entry: str(entry.k)),
        number("windows", lambda entry: f"{entry.windows:,.0f}"),
        number("top share", lambda entry: _with_deviation(entry, "top_share", ".2f")),
        number("entropy (nats)", lambda entry: _with_deviation(entry, "entropy", ".2f")),
        number("effective clusters", lambda entry: _with_deviation(entry, "effective_clusters", ".1f")),
    ]
    return Table.of(results.concentration, columns, title="Concentration of each set in clusters")


def selection_table(results: Results) -> Table:
    """The expert that each criterion would take, the rank of the expert taken, and the criterion's cost."""
    columns: list[Column[Selection]] = [
        word("selection", lambda entry: entry.stage),
        word("domain", lambda entry: entry.domain),
        *map(_seed_column, varying(results.selection)),
        word("criterion", lambda entry: entry.criterion),
        word("decides", lambda entry: "yes" if entry.criterion == entry.by else ""),
        word("its choice", lambda entry: entry.criterion_choice or "not run"),
        word("taken", lambda entry: entry.choice),
        number("rank of taken", lambda entry: _known(entry.rank, ".0f")),
        number("tokens", lambda entry: _known(entry.tokens, ",.0f")),
        number("FLOPs", lambda entry: _known(entry.flops, ".1e")),
    ]
    return Table.of(results.selection, columns, title="Choice of an expert")


def rates_table(results: Results) -> Table:
    """For trainings with several learning rates: the best validation loss of each, and the one taken."""
    columns: list[Column[LearningRate]] = [
        word("training", lambda entry: entry.stage),
        word("domain", lambda entry: entry.domain),
        *map(_seed_column, varying(results.learning_rates)),
        word("taken", _taken),
        number("learning rate", lambda entry: f"{entry.learning_rate:g}"),
        number("validation loss", lambda entry: _known(entry.validation_loss, ".3f") or "not finite"),
    ]
    return Table.of(results.learning_rates, columns, title="Choice of a learning rate")


def _seed_column(name: str) -> Column[Any]:
    return word(name.replace("_", " "), lambda entry: str(getattr(entry, name)))


def _taken(entry: LearningRate) -> str:
    if entry.learning_rate != entry.choice:
        return ""
    return f"yes; {entry.untried} not tried" if entry.untried else "yes"


def _known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
