"""Which of the paper's orders of methods hold, on how many seeds, and by how much."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from megatron_specialm.base.terminal import Table
from megatron_specialm.config.text import GENERIC, size_name
from megatron_specialm.report.rows import Average, Results, Row, Seeds
from megatron_specialm.report.tables import is_tuned, largest_budget

# The method with the lower perplexity first (Grangier et al., arXiv 2402.01093). Two orders are not in the paper: a soup
# against one expert, and LoRA against fine-tuning all weights.
ORDERS = (
    ("llm", "slm-d"), ("slm-d", "slm"), ("llm", "slm"), ("slm-pn", "slm"), ("slm-mix", "slm"), ("slm-is", "slm"),
    ("slm", "slm-nopt"), ("slm-pn-soup", "slm-pn"), ("llm", "llm-lora"),
)  # fmt: skip

Model = tuple[str, bool]  # a method, and whether it is fine-tuned
Scores = Mapping[tuple[str, str, bool], Mapping[Seeds, float]]  # set, model -> perplexity of each seed


def orders_table(results: Results) -> Table:
    """A line per order of two methods with results, fine-tuned and before, and per method with both states.

    A cell has the number of seeds at which the first method has the lower perplexity, and the difference in percent of the
    second's: the mean over seeds of the difference within a seed, with minimum and maximum. Of each method the largest budget
    is compared.

    Args:
        results: of one or several seeds, not merged: from `read_runs` or `results_from_rows`.
    """
    scores = _scores(results)
    sets = list(dict.fromkeys(name for name, *_ in scores))
    methods = list(dict.fromkeys(method for _, method, _ in scores))
    lines = []
    for label, lower, higher in _comparisons(methods):
        cells = [_cell(scores.get((name, *lower), {}), scores.get((name, *higher), {})) for name in sets]
        if any(cells):
            lines.append([label, *cells])
    return Table("Orders: the first has the lower perplexity", ["order", *sets], lines, 1)


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
    named += [(_macro_name(average), average) for average in largest_budget(results.macro)]
    for name, entry in named:
        scores.setdefault((name, entry.method, is_tuned(entry)), {})[entry.seeds] = entry.perplexity
    return scores


def _macro_name(average: Average) -> str:
    return "macro" if average.size is None else f"macro {size_name(average.size)}"


def _cell(first: Mapping[Seeds, float], second: Mapping[Seeds, float]) -> str:
    """Empty if no seed has both."""
    differences = [100 * (first[seed] / second[seed] - 1) for seed in first.keys() & second.keys()]
    if not differences:
        return ""
    held = sum(difference < 0 for difference in differences)
    spread = f" ({min(differences):+.1f} to {max(differences):+.1f})" if len(differences) > 1 else ""
    return f"{held} of {len(differences)}, {statistics.fmean(differences):+.1f}%{spread}"
