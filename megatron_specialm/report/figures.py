"""The paper's figures, from `results.json` of one run or of several seeds: perplexity against what it costs.

    generic-cost, specialization-cost, total-cost   macro perplexity against each, in FLOPs and in device-hours
    domains, domains-by-size                        a panel per domain
    set-size                                        macro perplexity against the tokens of the domain, if sizes differ

A curve connects the budgets of a method: its fine-tuned stages, cheapest first. A figure for a single budget shows the
largest. Figures without data are left out. A ring marks a fine-tuning that the cap on steps ended.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_specialm.base.files import write_text
from megatron_specialm.config.text import GENERIC, size_name
from megatron_specialm.report import drawing
from megatron_specialm.report.drawing import Curve, Look
from megatron_specialm.report.rows import DOMAIN_COUNTS, SPECIALIZATION, Average, Results, Row, to_csv
from megatron_specialm.report.tables import (
    CAPPED_MEANS,
    Scored,
    concentration_table,
    is_tuned,
    largest_budget,
    rates_table,
    results_table,
    selection_table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = Row | Average
Cost = Callable[[Point], float]


def draw(results: Results, root: Path) -> list[Path]:
    """Write all figures (PNG and SVG) and tables (Markdown and CSV) into `root/figures`; returns what was written."""
    folder = root / "figures"
    written = draw_figures(results, folder)
    for part, table in (
        ("rows", results_table),
        ("concentration", concentration_table),
        ("selection", selection_table),
        ("learning_rates", rates_table),
    ):
        if entries := getattr(results, part):
            name = "results" if part == "rows" else part
            written += [folder / f"{name}.md", folder / f"{name}.csv"]
            write_text(written[-2], table(results).markdown())
            write_text(written[-1], to_csv(entry.columns() for entry in entries))
    return written


def draw_figures(
    results: Results, folder: Path, *, names: Sequence[str] | None = None, formats: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Write the figures with these names, or all, into `folder`; returns what was written."""
    with drawing.our_style():
        return [
            path
            for name, figure in _figures(results)
            if names is None or name in names
            for path in drawing.save(figure, folder / name, formats)
        ]


def _figures(results: Results) -> Iterator[tuple[str, "Figure"]]:
    rows = [row for row in results.rows if row.domain != GENERIC]
    looks = drawing.looks(dict.fromkeys(row.method for row in rows))
    tuned = [entry for entry in results.macro if is_tuned(entry)]
    if tuned:
        yield from _cost_figures(tuned, looks)
    has_sizes = len({row.size for row in rows if row.size is not None}) > 1
    if unsized := [row for row in rows if row.size is None or not has_sizes]:
        yield "domains", _domains(unsized, looks)
    if not has_sizes:
        return
    if sized := [row for row in largest_budget(rows) if row.size is not None and is_tuned(row)]:
        yield "domains-by-size", _by_size(sized, looks, title=lambda row: row.base_domain, what="perplexity")
    if averages := [entry for entry in largest_budget(tuned) if entry.size is not None]:
        yield "set-size", _by_size(averages, looks, title=lambda _: "", what="macro perplexity")


# --- against cost -----------------------------------------------------------------------------------------------------


def _cost_figures(entries: Sequence[Point], looks: Mapping[str, Look]) -> Iterator[tuple[str, "Figure"]]:
    """Each kind of cost in each measure. Total cost has a panel per number of domains."""
    devices = " and ".join(sorted({entry.devices for entry in entries if entry.devices}))
    for name, what, unit, scale in (
        ("flops", "flops", "FLOPs", 1),
        ("hours", "device_seconds", f"device-hours on {devices}", 3600),
    ):
        columns = {phase: {"": _phase_cost(phase, what, scale)} for phase in (GENERIC, SPECIALIZATION)}
        columns["total"] = {
            f"{domains} domain{'s' if domains > 1 else ''}": _total_cost(domains, what, scale)
            for domains in DOMAIN_COUNTS
        }
        for kind, costs in columns.items():
            if any(cost(entry) for cost in costs.values() for entry in entries):
                yield f"{kind}-cost-{name}", _against_cost(entries, looks, costs, f"{kind} training cost ({unit})")


def _phase_cost(phase: str, what: str, scale: float) -> Cost:
    return lambda entry: entry.cost(phase, what) / scale


def _total_cost(domains: int, what: str, scale: float) -> Cost:
    return lambda entry: entry.total(what, domains=domains) / scale


def _against_cost(
    entries: Sequence[Point], looks: Mapping[str, Look], costs: Mapping[str, Cost], unit: str
) -> "Figure":
    """Macro perplexity against each of the costs, for each size."""
    panels = {}
    for size, (title, cost) in itertools.product(_sizes(entries), costs.items()):
        own = _by_method(entry for entry in entries if entry.size == size)
        name = ", ".join(filter(None, (title, "" if size is None else f"{size_name(size)} tokens")))
        # A cost of zero cannot be on a logarithmic axis; where all are zero, the curve is a horizontal line.
        paid = {method: [point for point in points if cost(point) > 0] or points for method, points in own.items()}
        panels[name] = [_curve(method, points, cost) for method, points in paid.items()]
    figure = _panels(panels, looks, x=unit, y="macro perplexity", same_y=len(costs) > 1)
    for axes, curves in zip(figure.axes, panels.values(), strict=False):
        drawing.log_axis(axes, "x", [x for curve in curves for x in curve.x], margin=0.12)
    if len(panels) == 1:
        if rings := _rings(panels):
            drawing.legend(figure, (), looks, rings=rings, place="outside upper center")
        drawing.label_curves(figure.axes[0], next(iter(panels.values())), looks)
    else:
        _legend(figure, panels, looks)
    return figure


def _panels(
    panels: Mapping[str, Sequence[Curve]], looks: Mapping[str, Look], *, x: str, y: str, same_y: bool = False
) -> "Figure":
    """A panel of curves under each title, at most three in a row."""
    rows, columns = _grid(len(panels))
    size = (4.6, 3.2) if len(panels) == 1 else (2.4, 2.3)
    figure = drawing.new_figure(rows, columns, panel=size, share_y="row" if same_y else "none")
    for axes, (title, curves) in zip(figure.axes, panels.items(), strict=False):
        for curve in curves:
            drawing.plot(axes, curve, looks[curve.method])
        drawing.log_axis(axes, "y", [end for curve in curves for end in curve.ends()])
        axes.set_title(title)
    figure.supxlabel(x, fontsize=8)
    figure.supylabel(y, fontsize=8)
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    return figure


def _legend(figure: "Figure", panels: Mapping[str, Sequence[Curve]], looks: Mapping[str, Look]) -> None:
    """The methods right of the panels, in the order in which the curves of the first one end."""
    first, *others = panels.values()
    ordered = itertools.chain(sorted(first, key=lambda curve: -curve.y[-1]), *others)
    drawing.legend(figure, dict.fromkeys(curve.method for curve in ordered), looks, rings=_rings(panels))


def _rings(panels: Mapping[str, Sequence[Curve]]) -> str:
    """The legend's text for rings; empty without any."""
    has_rings = any(any(curve.ringed) for curves in panels.values() for curve in curves)
    return CAPPED_MEANS.replace(", ", ",\n") if has_rings else ""


def _by_method(entries: Iterable[Point]) -> dict[str, list[Point]]:
    """The entries of each method, the cheapest first."""
    methods: dict[str, list[Point]] = {}
    for entry in sorted(entries, key=lambda entry: entry.total_flops_1):
        methods.setdefault(entry.method, []).append(entry)
    return methods


def _curve(method: str, points: Sequence[Point], x: Callable[[Point], float]) -> Curve:
    return Curve(
        method,
        [x(point) for point in points],
        [point.perplexity for point in points],
        [_deviation(point) for point in points],
        [bool(point.capped) for point in points],
    )


def _deviation(entry: Point) -> float | None:
    return entry.spread.deviation["perplexity"] if entry.spread else None


# --- by domain and by size --------------------------------------------------------------------------------------------


def _domains(rows: Sequence[Row], looks: Mapping[str, Look]) -> "Figure":
    """A line per method, the best at the top; before (hollow) and after fine-tuning, ringed where a cap ended it."""
    domains = dict.fromkeys(row.domain for row in rows)
    chosen = {(row.method, row.domain, is_tuned(row)): row for row in largest_budget(rows)}
    means = {
        method: _best_mean([row for (name, *_), row in chosen.items() if name == method])
        for method in dict.fromkeys(row.method for row in rows)
    }
    order = sorted(means, key=lambda method: -means[method])
    height = 0.55 + 0.2 * len(order)
    lines, columns = _grid(len(domains))
    width = 2.5 if columns > 1 else 3.6  # for the label below
    figure = drawing.new_figure(lines, columns, panel=(width, height), share_y="all")
    for axes, domain in zip(figure.axes, domains, strict=False):
        values = []
        for place, method in enumerate(order):
            states = [chosen[key] for state in (False, True) if (key := (method, domain, state)) in chosen]
            _draw_states(axes, place, states, looks[method])
            values += [state.perplexity for state in states]
        drawing.log_axis(axes, "x", values, margin=0.18)
        axes.set_title(domain)
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.tick_params(axis="y", length=0)
    note = f"\nringed: {CAPPED_MEANS}" if any(row.capped for row in chosen.values()) else ""
    figure.supxlabel(f"perplexity   (hollow: before fine-tuning, filled: after){note}", fontsize=8)
    for axes in figure.axes[len(domains) :]:
        axes.set_visible(False)
    return figure


def _best_mean(rows: Sequence[Row]) -> float:
    """The mean negative log-likelihood of a method's last state."""
    last = [row.nll for row in rows if is_tuned(row)] or [row.nll for row in rows]
    return sum(last) / len(last)


def _draw_states(axes: "Axes", place: int, states: Sequence[Point], look: Look) -> None:
    xs = [state.perplexity for state in states]
    axes.plot(xs, [place] * len(xs), color=look.colour, linewidth=0.8)
    for state, x in zip(states, xs, strict=True):
        face = look.colour if is_tuned(state) else "white"
        axes.errorbar(
            x, place, xerr=_deviation(state) or None, color=look.colour, markerfacecolor=face,
            markeredgewidth=0.9, elinewidth=0.8, capsize=2, **look.marker_style,
        )  # fmt: skip
        if state.capped:
            drawing.draw_ring(axes, x, place, look)
    if xs:
        axes.annotate(
            f"{xs[-1]:.1f}", (min(xs), place), (-6, 0), textcoords="offset points", ha="right", va="center", fontsize=6.5,
            color="#333333",
        )  # fmt: skip


def _by_size(
    entries: Sequence[Scored], looks: Mapping[str, Look], *, title: Callable[[Scored], str], what: str
) -> "Figure":
    """Perplexity against the tokens of the specialization set, a panel per title."""
    groups: dict[str, list[Scored]] = {}
    for entry in sorted(entries, key=lambda entry: entry.size or 0):
        groups.setdefault(title(entry), []).append(entry)
    panels = {}
    for name, own in groups.items():
        methods = dict.fromkeys(entry.method for entry in own)
        panels[name] = [
            _curve(method, [entry for entry in own if entry.method == method], lambda entry: entry.size or 0)
            for method in methods
        ]
    figure = _panels(panels, looks, x="training tokens of the domain", y=what)
    for axes, own in zip(figure.axes, groups.values(), strict=False):
        sizes = _sizes(own)
        drawing.log_axis(axes, "x", map(float, sizes), margin=0.08)
        axes.set_xticks(sizes, [size_name(size) for size in sizes])
    _legend(figure, panels, looks)
    return figure


def _sizes(entries: Iterable[Point]) -> list[Any]:
    """The sizes in order; None, of domains without sizes, is last."""
    return sorted({entry.size for entry in entries}, key=lambda size: (size is None, size))


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns for so many panels, at most three in a row."""
    columns = min(3, panels)
    return math.ceil(panels / columns), columns
