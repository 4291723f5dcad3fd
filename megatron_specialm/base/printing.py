"""Printing without control characters. Names, paths, errors and logs may contain some, which must not reach a terminal.

All output goes through `say`, the `console` of `base/terminal.py`, or the log; a test finds other printing.
"""

import logging
import re
import sys
from collections.abc import Sequence

# Control characters except line break and tab; marks that change the text's direction; other line ends; surrogates, which file
# names may contain.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters as escapes."""
    return _CONTROL.sub(lambda found: repr(found.group())[1:-1], text)


def first_of(names: Sequence[object], most: int) -> str:
    """The first names, and how many more there are: `a, b and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
    """Print a text and flush; `error`: on standard error."""
    print(printable(str(text)), file=sys.stderr if error else sys.stdout, end=end, flush=True)


class PrintableFormatter(logging.Formatter):
    """Log records without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_stderr(form: str, *, level: int = logging.WARNING, force: bool = False) -> None:
    """`logging.basicConfig` with `PrintableFormatter`."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(form))
    logging.basicConfig(level=level, handlers=[handler], force=force)
