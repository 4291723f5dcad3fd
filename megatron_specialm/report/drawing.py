"""The style of figures: a colour and marker per method, logarithmic axes with readable ticks, labels beside curves.

matplotlib is imported within `our_style` only, so that the CLI starts fast. No display is needed, and the user's own matplotlib
settings have no effect.
"""

import contextlib
import importlib.util
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.edgecolor": "#555555",
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.color": "#333333", "ytick.color": "#333333",
    "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "specialm", "figure.constrained_layout.use": True,
}  # fmt: skip
DOTS_PER_INCH = 200

# Okabe and Ito's palette without its yellow, which is too pale for lines: distinct with any colour vision, and each with its
# own marker for print in grey. The paper's methods have fixed colours; others take Tol's muted ones, dashed.
_PAPER = {
    "slm": ("#0072B2", "o"), "slm-nopt": ("#555555", "s"), "slm-is": ("#D55E00", "D"), "slm-mix": ("#009E73", "^"),
    "slm-pn": ("#CC79A7", "v"), "slm-d": ("#56B4E9", "P"), "llm": ("#E69F00", "X"),
}  # fmt: skip
_OTHERS = [("#332288", "*"), ("#882255", "<"), ("#999933", ">"), ("#44AA99", "h"), ("#8C510A", "p"), ("#AA4499", "d")]
_RING: dict[str, Any] = {"marker": "o", "markersize": 9.5, "markerfacecolor": "none", "linestyle": "none"}
_MARKER_SIZES = {"P": 5.0, "X": 5.0, "*": 6.5}  # of those that look small, in points


@dataclass(frozen=True)
class Look:
    """How a method is drawn in every figure."""

    colour: str
    marker: str
    line: Literal["-", "--", ":", "-."] = "-"

    @property
    def marker_style(self) -> dict[str, Any]:
        """The marker, as keyword arguments of matplotlib."""
        return {"marker": self.marker, "markersize": _MARKER_SIZES.get(self.marker, 4.3)}


@dataclass(frozen=True)
class Curve:
    """A method's points in order. `spread` (None where unknown) is the standard deviation of y over seeds; `ringed` points
    are marked by a ring."""

    method: str
    x: list[float]
    y: list[float]
    spread: list[float | None]
    ringed: list[bool]

    @property
    def is_free(self) -> bool:
        """Whether all costs on x are zero: such a curve cannot be on a logarithmic axis, and is a horizontal line."""
        return not any(self.x)

    def ends(self) -> list[float]:
        """The values of y between which the error bars reach."""
        pairs = list(zip(self.y, self.spread, strict=True))
        return [y - (sd or 0) for y, sd in pairs] + [y + (sd or 0) for y, sd in pairs]


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method. That of the paper's methods does not depend on which others are drawn."""
    names = sorted(methods)
    found = {method: Look(*_PAPER[method]) for method in names if method in _PAPER}
    lines: tuple[Literal["--", ":", "-."], ...] = ("--", ":", "-.")
    others = itertools.cycle(itertools.product(lines, _OTHERS))
    for method in names:
        if method not in found:
            line, (colour, marker) = next(others)
            found[method] = Look(colour, marker, line)
    return found


@contextlib.contextmanager
def our_style() -> Iterator[None]:
    """Draw with Agg and this project's style, whatever the environment is: matplotlib refuses the `MPLBACKEND` of a notebook
    that is not installed, and a user's matplotlibrc would change the figures.

    Raises:
        ConfigError: a matplotlibrc in the working directory is not text.
    """
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None and spec.origin is not None
    # Both are read when matplotlib is first imported.
    os.environ["MPLBACKEND"] = "agg"
    os.environ["MATPLOTLIBRC"] = str(Path(spec.origin).parent / "mpl-data" / "matplotlibrc")
    try:
        import matplotlib
    except UnicodeDecodeError as error:  # matplotlib reads the one in the working directory first
        raise ConfigError(f"{Path('matplotlibrc').resolve()}: matplotlib cannot read it ({error}): remove it") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(
    rows: int, columns: int, *, panel: tuple[float, float], share_y: Literal["none", "row", "all"] = "none"
) -> "Figure":
    """A figure of panels, each of that width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * panel[0], rows * panel[1]))
    figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    return figure


def save(figure: "Figure", path: Path, formats: Sequence[str]) -> list[Path]:
    """Write the figure as "png", "svg" or both; `path` is without its suffix. Equal figures give equal files."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is done: not again for each format
    written = []
    for form in formats:
        target = path.with_name(f"{path.name}.{form}")
        metadata = {"Date": None} if form == "svg" else None
        with atomic_path(target) as temporary:
            figure.savefig(temporary, format=form, dpi=DOTS_PER_INCH, metadata=metadata)
        written.append(target)
    return written


# --- curves and axes --------------------------------------------------------------------------------------------------


def plot(axes: "Axes", curve: Curve, look: Look) -> None:
    """A curve with its markers and error bars."""
    if curve.is_free:
        axes.axhline(curve.y[-1], color=look.colour, linewidth=1.0, linestyle=(0, (6, 3)))
        if curve.ringed[-1]:
            axes.plot([0.97], curve.y[-1:], color=look.colour, transform=axes.get_yaxis_transform(), **_RING)
        return
    axes.plot(curve.x, curve.y, color=look.colour, linestyle=look.line, linewidth=1.2, **look.marker_style)
    bars = [spread or 0.0 for spread in curve.spread]
    if any(bars):
        axes.errorbar(curve.x, curve.y, yerr=bars, fmt="none", ecolor=look.colour, elinewidth=0.8, capsize=3)
    for x, y, is_ringed in zip(curve.x, curve.y, curve.ringed, strict=True):
        if is_ringed:
            draw_ring(axes, x, y, look)


def draw_ring(axes: "Axes", x: float, y: float, look: Look) -> None:
    """A ring around a point, of its method's colour."""
    axes.plot([x], [y], color=look.colour, **_RING)


def log_axis(axes: "Axes", which: Literal["x", "y"], values: Iterable[float], *, margin: float = 0.08) -> None:
    """A logarithmic axis around the values, with ticks at round numbers and none between.

    Args:
        margin: the space on either side, as a fraction of the values' range.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    positive = [value for value in values if value > 0]
    low, high = min(positive), max(positive)
    room = max((high / low) ** margin, 1.02) if high > low else 1.3
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low / room, high * room)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    ticks = round_numbers(low / room, high * room)
    if which == "x":  # labels side by side need space
        ticks = apart(ticks, by=(high * room * room / low) ** 0.2)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def round_numbers(low: float, high: float) -> list[float]:
    """Up to eight round numbers within the limits, at least three where there are: powers of ten, or finer ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = math.ceil(len(decades) / 6)
    ticks: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(n / 10 for n in range(10, 100))):
        ticks = [m * 10.0**decade for decade in decades[::every] for m in mantissas if low <= m * 10.0**decade <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 8)] if ticks else [low, high]


def apart(ticks: Sequence[float], *, by: float) -> list[float]:
    """Those of ascending numbers that are at least `by` times the one kept before."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= by * kept[-1]:
            kept.append(tick)
    return kept


def number(value: float) -> str:
    """A tick's number: plain where it is short, else with a power of ten."""
    if 1e-3 <= value < 1e5:
        return f"{value:.4g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = f"{value / 10.0**exponent:.3g}"
    return f"$10^{{{exponent}}}$" if mantissa == "1" else rf"${mantissa}\times10^{{{exponent}}}$"


# --- names beside their curves ----------------------------------------------------------------------------------------

_DISTANCES = (5, 9, 14, 20, 28, 38)  # of a label from its point, in points
_ANGLES = [
    math.radians(angle) for angle in (0, 20, -20, 45, -45, 70, -70, 90, -90, 110, -110, 135, -135, 160, -160, 180)
]
_LEADER = 9  # from this distance on, a line leads from the point to the label


class Place(NamedTuple):
    """A place for a label: the point that it names (the `rank`-th from the curve's end), the offset from there in points,
    and the corners of its box in pixels."""

    point: tuple[float, float]
    rank: int
    way: tuple[float, float]
    distance: float
    low: "np.ndarray"
    high: "np.ndarray"


def label_curves(axes: "Axes", curves: Sequence[Curve], of: Mapping[str, Look]) -> None:
    """Write each method's name near its own curve, where it covers nothing.

    Places around every point of the curve are tried. Axis limits and all other text must be set before.
    """
    import numpy as np

    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]
    frame = axes.get_window_extent().get_points()
    ink = {curve.method: _ink(axes, curve) for curve in curves}
    taken: list[Place] = []
    for curve in sorted(curves, key=lambda curve: curve.y[-1]):
        foreign = np.concatenate([np.empty((0, 2)), *(ink[name] for name in ink if name != curve.method)])
        colour = of[curve.method].colour
        label = axes.annotate(
            f"{curve.method} (at no cost)" if curve.is_free else curve.method, (0, 0), (0, 0),
            textcoords="offset points", ha="center", va="center", fontsize=7.5, color=_darker(colour), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colour, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
        label.set_in_layout(False)
        places = _places(axes, curve, np.asarray(label.get_window_extent().size))
        best = min(places, key=lambda place: _badness(place, frame, ink[curve.method], foreign, taken))
        label.xy = best.point
        label.set_position(best.way)
        assert label.arrow_patch is not None
        label.arrow_patch.set_visible(best.distance >= _LEADER and not curve.is_free)
        taken.append(best)


def _places(axes: "Axes", curve: Curve, size: "np.ndarray") -> Iterator[Place]:
    """Around every point of the curve, with the text's edge at each distance."""
    import numpy as np

    pixels_per_point = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    points = list(zip(curve.x, curve.y, strict=True))
    if curve.is_free:  # a line from left to right
        left, right = axes.get_xlim()
        points = [(left ** (1 - share) * right**share, curve.y[-1]) for share in (0.8, 0.6, 0.4, 0.2)]
    for rank, point in enumerate(reversed(points)):
        for distance, angle in itertools.product(_DISTANCES, _ANGLES):
            way = np.array([math.cos(angle), math.sin(angle)]) * (distance * pixels_per_point + size / 2)
            middle = axes.transData.transform(point) + way
            x, y = way / pixels_per_point
            yield Place(point, rank, (x, y), distance, middle - size / 2, middle + size / 2)


def _badness(
    place: Place, frame: "np.ndarray", own: "np.ndarray", foreign: "np.ndarray", taken: Sequence[Place]
) -> float:
    """A penalty: largest for text over text or outside the frame, then over curves, near other curves, and far away."""
    outside = max(0.0, *(frame[0] - place.low), *(place.high - frame[1]))
    overlaps = sum(bool((place.low < other.high + 2).all() and (other.low - 2 < place.high).all()) for other in taken)
    covered = _inside(place, own, room=1) + _inside(place, foreign, room=1)
    crowded = _inside(place, foreign, room=5)
    return 100 * overlaps + 5 * outside + 10 * covered + 2 * crowded + 0.8 * place.distance + place.rank


def _inside(place: Place, points: "np.ndarray", *, room: float) -> int:
    return int(((points > place.low - room) & (points < place.high + room)).all(axis=1).sum())


def _ink(axes: "Axes", curve: Curve) -> "np.ndarray":
    """Points (N, 2) along a curve, in pixels, dense enough that no text fits between them."""
    import numpy as np

    points = [(x, curve.y[-1]) for x in axes.get_xlim()] if curve.is_free else list(zip(curve.x, curve.y, strict=True))
    pixels = axes.transData.transform(points)
    lengths = np.hypot(*np.diff(pixels, axis=0).T)
    between = [
        np.linspace(start, end, max(2, round(length / 4)))
        for (start, end), length in zip(itertools.pairwise(pixels), lengths, strict=True)
    ]
    return np.concatenate([pixels, *between])


def _darker(colour: str) -> str:
    """For text, which is thinner than lines."""
    return "#" + "".join(f"{int(int(colour[i : i + 2], 16) * 0.8):02X}" for i in (1, 3, 5))


def legend(
    figure: "Figure",
    methods: Iterable[str],
    of: Mapping[str, Look],
    *,
    rings: str = "",
    place: Literal["outside right center", "outside upper center"] = "outside right center",
) -> None:
    """One legend beside all panels: the methods, and the meaning of `rings` if there are any."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=of[name].colour, linestyle=of[name].line, linewidth=1.2, label=name, **of[name].marker_style
        )
        for name in methods
    ]
    if rings:
        handles.append(Line2D([], [], color="#333333", label=rings, **_RING))
    figure.legend(handles=handles, loc=place, fontsize=7.5, handlelength=2.6)
