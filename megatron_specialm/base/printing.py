"""What is printed is text: names, paths, errors and logs may hold what would steer a terminal, and nothing of it does.

Everything that people read goes through `say`, the `console` of `base/terminal.py`, or the log; a test looks for what does not.
"""

import logging
import re
import sys

# Control characters but line break and tab; the marks that reverse the order of letters; other line ends; halves of characters,
# as names of files may hold.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text, with characters that no terminal should be given written as escapes."""
    return _STEERING.sub(lambda found: repr(found.group())[1:-1], text)


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
    """Print a text at once, on standard error where it is no result."""
    print(printable(str(text)), file=sys.stderr if error else sys.stdout, end=end, flush=True)


class PrintableFormatter(logging.Formatter):
    """Records as text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_stderr(form: str, *, level: int = logging.WARNING, force: bool = False) -> None:
    """`logging.basicConfig` for records as text."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(form))
    logging.basicConfig(level=level, handlers=[handler], force=force)
