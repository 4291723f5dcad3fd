"""Which of the paper's orders of methods hold, on how many seeds, and by how much."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_specialm.base.terminal import Column, Table, number, word
from megatron_specialm.config.text import GENERIC, size_name
from megatron_specialm.report.rows import Average, Results, Row, Seeds
from megatron_specialm.report.tables import is_tuned, largest_budget

# The method with the lower perplexity first. Those of Grangier et al. (arXiv 2402.01093), then ours: a soup against one
# expert; LoRA; experts from a shared start (c-BTM); resampling from a projected expert, or from SLM (`evidence.yaml`).
ORDERS = (
    ("llm", "slm-d"), ("slm-d", "slm"), ("llm", "slm"), ("slm-pn", "slm"), ("slm-mix", "slm"), ("slm-is", "slm"),
    ("slm", "slm-nopt"),
    ("slm-pn-soup", "slm-pn"), ("llm", "llm-lora"), ("slm-btm", "slm-mix"), ("slm-btm", "slm"), ("slm-pn-is", "slm-pn"),
    ("slm-pn-is", "slm-is"), ("slm-pn-is", "slm-cis"), ("slm-cis", "slm"),
)  # fmt: skip

MACRO = "macro"  # of all domains, with the size behind it

Model = tuple[str, bool]  # a method, and whether it is fine-tuned
Scores = Mapping[tuple[str, str, bool], Mapping[Seeds, float]]  # set, model -> perplexity of each seed


@dataclass(frozen=True)
class Order:
    """Two models of which the first should have the lower perplexity.

    Attributes:
        differences: per set, the difference at each seed in percent of the second's perplexity.
    """

    label: str
    differences: Mapping[str, list[float]]


def find_orders(results: Results) -> list[Order]:
    """The orders of two methods with results, fine-tuned and before, and per method with both states. Of each method the
    largest budget is compared.

    Args:
        results: of one or several seeds, not merged: from `read_runs` or `results_from_rows`.
    """
    scores = _scores(results)
    sets = list(dict.fromkeys(name for name, *_ in scores))
    methods = list(dict.fromkeys(method for _, method, _ in scores))
    orders = [
        Order(
            label,
            {name: _differences(scores.get((name, *lower), {}), scores.get((name, *higher), {})) for name in sets},
        )
        for label, lower, higher in _comparisons(methods)
    ]
    return [order for order in orders if any(order.differences.values())]


def orders_table(results: Results, *, only_averages: bool = False) -> Table:
    """A line per order. A cell has the number of seeds at which it holds, and the mean difference over seeds, with minimum and
    maximum; it is empty if no seed has both models."""
    orders = find_orders(results)
    sets = dict.fromkeys(name for name, *_ in _scores(results) if not only_averages or name.startswith(MACRO))
    columns: list[Column[Order]] = [word("order", lambda order: order.label), *map(_column, sets)]
    return Table.of(orders, columns, title="Orders: the first has the lower perplexity")


def _column(name: str) -> Column[Order]:
    return number(name, lambda order: _cell(order.differences[name]))


def _cell(differences: Sequence[float]) -> str:
    if not differences:
        return ""
    held = sum(difference < 0 for difference in differences)
    spread = f" ({min(differences):+.1f} to {max(differences):+.1f})" if len(differences) > 1 else ""
    return f"{held} of {len(differences)}, {statistics.fmean(differences):+.1f}%{spread}"


def _differences(first: Mapping[Seeds, float], second: Mapping[Seeds, float]) -> list[float]:
    return [100 * (first[seed] / second[seed] - 1) for seed in first.keys() & second.keys()]


def _comparisons(methods: Sequence[str]) -> Iterator[tuple[str, Model, Model]]:
    for tuned in (True, False):
        for lower, higher in ORDERS:
            yield f"{lower} < {higher}{'' if tuned else ', not fine-tuned'}", (lower, tuned), (higher, tuned)
    for method in methods:
        yield f"{method}: fine-tuned < not", (method, True), (method, False)


def _scores(results: Results) -> Scores:
    """The perplexities of every domain, and the averages over the domains of a size."""
    scores: dict[tuple[str, str, bool], dict[Seeds, float]] = {}
    rows = largest_budget([row for row in results.rows if row.domain != GENERIC])
    named: list[tuple[str, Row | Average]] = [(row.domain, row) for row in rows]
    for average in largest_budget(results.macro):
        named.append((MACRO if average.size is None else f"{MACRO} {size_name(average.size)}", average))
    for name, entry in named:
        scores.setdefault((name, entry.method, is_tuned(entry)), {})[entry.seeds] = entry.perplexity
    return scores
