"""Which small model is the best at each total cost, for one, several and many domains."""

from collections.abc import Iterator
from typing import NamedTuple

from megatron_specialm.base.terminal import Column, Table, number, word
from megatron_specialm.config.text import size_name
from megatron_specialm.report.rows import DOMAIN_COUNTS, Average, Results
from megatron_specialm.report.tables import is_tuned, with_deviation


class Best(NamedTuple):
    """A model that no cheaper or equally cheap one is better than, if its generic cost is shared by `domains` of them."""

    domains: int
    average: Average


def find_frontier(results: Results) -> list[Best]:
    """The models with the lowest macro perplexity up to their total training cost in FLOPs, of those that infer with the fewest
    parameters: per number of domains and size of their sets, cheapest first."""
    fewest = min((average.inference_parameters for average in results.macro), default=0)
    small = [average for average in results.macro if average.inference_parameters == fewest]
    sizes = sorted({average.size for average in small}, key=lambda size: size or 0)
    return [
        best
        for domains in DOMAIN_COUNTS
        for size in sizes
        for best in _undominated([average for average in small if average.size == size], domains)
    ]


def _undominated(averages: list[Average], domains: int) -> Iterator[Best]:
    lowest = float("inf")
    for average in sorted(averages, key=lambda one: (one.total("flops", domains=domains), one.perplexity)):
        if average.perplexity < lowest:
            lowest = average.perplexity
            yield Best(domains, average)


def frontier_table(results: Results) -> Table:
    """A line per best model."""
    columns: list[Column[Best]] = [
        word("domains", lambda best: str(best.domains)),
        word("set size", lambda best: "" if best.average.size is None else size_name(best.average.size)),
        word("method", lambda best: best.average.method),
        word("fine-tuned", lambda best: "yes" if is_tuned(best.average) else "no"),
        word("stage", lambda best: best.average.stage),
        number("total FLOPs", lambda best: f"{best.average.total('flops', domains=best.domains):.1e}"),
        number("macro", lambda best: with_deviation(best.average, "perplexity", ".1f")),
    ]
    return Table.of(find_frontier(results), columns, title="The best small model at each total training cost")
