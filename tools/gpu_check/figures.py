"""The results of a part: named figures, each with its expected value."""

import math
import traceback
from collections.abc import Generator
from typing import NamedTuple, TypeVar

from megatron_specialm.base.errors import SpecialmError

T = TypeVar("T")


class Figure(NamedTuple):
    """`good`: whether the value is as `expected`; None if nothing is expected, or if tiny sizes are not conclusive."""

    name: str
    value: float | str
    unit: str = ""
    expected: str = ""
    good: bool | None = None


def at_most(name: str, value: float, bound: float, unit: str = "", *, judged: bool = True) -> Figure:
    """A figure that should not exceed a bound; NaN does."""
    return Figure(name, value, unit, f"<= {bound:g}", value <= bound if judged else None)


def at_least(name: str, value: float, bound: float, unit: str = "", *, judged: bool = True) -> Figure:
    """A figure that should not be below a bound; NaN is."""
    return Figure(name, value, unit, f">= {bound:g}", value >= bound if judged else None)


def between(name: str, value: float, low: float, high: float, unit: str = "", *, judged: bool = True) -> Figure:
    """A figure that should be within bounds."""
    return Figure(name, value, unit, f"{low:g} to {high:g}", low <= value <= high if judged else None)


def attempt(name: str, figures: Generator[Figure, None, T]) -> Generator[Figure, None, T | None]:
    """Figures of one of several measurements, and its return value. An exception becomes a figure, and the result None, so that
    the others are still measured; but an error of the machine or a missing package ends the part."""
    try:
        return (yield from figures)
    except (SpecialmError, ImportError):
        raise
    except Exception as error:
        traceback.print_exc()
        first_line = str(error).strip().partition("\n")[0][:120]
        yield Figure(name, f"failed: {type(error).__name__}: {first_line}", good=False)
        return None


def row(figure: Figure) -> str:
    """A line of the table."""
    mark = {None: "", True: "ok", False: "NOT AS EXPECTED"}[figure.good]
    value = figure.value if isinstance(figure.value, str) else _number(figure.value)
    return f"  {figure.name:<52} {value:>14} {figure.unit:<10} {figure.expected:<14} {mark}".rstrip()


def _number(value: float) -> str:
    if not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1:
        return f"{value:.4f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.2f}"
