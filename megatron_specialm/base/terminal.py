"""Tables for a terminal, a file and Markdown.

On a terminal no number is cut or broken over two lines: a table that is too wide is printed in parts, each with the columns of
words, and long words are folded. In a pipe, a file or a log, tables have any width.
"""

import io
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, OverflowMethod, RenderableType
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from megatron_specialm.base.printing import printable

UNLIMITED = 100_000  # columns of what is not a terminal
WORD_COLUMNS = 12  # the least width of words and headings, before numbers are moved to another part


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error. If it is not a terminal nothing is wrapped or animated, whatever `COLUMNS`, `TERM` or
    `FORCE_COLOR` are. Characters that its encoding lacks are written as escapes."""
    stream = sys.stderr if stderr else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    if stream is not None and stream.isatty():
        return _Screen(stderr=stderr, width=shutil.get_terminal_size().columns)
    return _Screen(stderr=stderr, width=UNLIMITED, height=25, force_interactive=False)


class _Screen(Console):
    """A console without markup: brackets and colons are printed as they are, and control characters as escapes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **style: Any) -> Text:
        return super().render_str(printable(text), **style)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def plain(text: str, style: str = "", *, overflow: OverflowMethod | None = None) -> Text:
    """A text without markup, for any console."""
    return Text(printable(text), style, overflow=overflow)


Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column of a table: its heading, and a row's cell as text. Columns of words are left-aligned and come first."""

    heading: str
    cell: Callable[[Row], str]
    is_word: bool


def word(heading: str, cell: Callable[[Row], str]) -> Column[Row]:
    """A column of words."""
    return Column(heading, cell, is_word=True)


def number(heading: str, cell: Callable[[Row], str]) -> Column[Row]:
    """A column of numbers."""
    return Column(heading, cell, is_word=False)


@dataclass(frozen=True)
class Table:
    """A table of text, for every renderer: a terminal (rich) and Markdown.

    The first `words` columns hold words, the others numbers. `note` is a line under the table. The column `cut` takes what
    width the others leave, and its words are cut there: a line of the table stays one line.
    """

    title: str
    header: list[str]
    lines: list[list[str]]
    words: int
    note: str = ""
    cut: str = ""

    @classmethod
    def of(
        cls, rows: Iterable[Row], columns: Sequence[Column[Row]], *, title: str = "", note: str = "", cut: str = ""
    ) -> "Table":
        """A line per row."""
        lines = [[column.cell(row) for column in columns] for row in rows]
        words = sum(column.is_word for column in columns)
        return cls(title, [column.heading for column in columns], lines, words, note, cut)

    def in_two(self, column: str, titles: tuple[str, str]) -> tuple["Table", "Table"]:
        """Split the numbers at a column; both tables have the words, and the first one has the note."""
        middle, end = self.header.index(column), len(self.header)
        return (
            replace(self._part(titles[0], range(self.words, middle)), note=self.note),
            self._part(titles[1], range(middle, end)),
        )

    def without(self, *columns: str) -> "Table":
        """The table without the columns of these names."""
        kept = [index for index, name in enumerate(self.header) if name not in columns]
        header, *lines = ([line[index] for index in kept] for line in (self.header, *self.lines))
        return replace(self, header=header, lines=lines, words=sum(index < self.words for index in kept))

    def markdown(self) -> str:
        """Without the title."""
        rule = ["---" if index < self.words else "---:" for index in range(len(self.header))]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in (self.header, rule, *self.lines)) + "\n"
        note = self.note.replace("*", "\\*")  # which would begin a list
        return f"{table}\n{note}\n" if note else table

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """For the terminal: in one part if it fits, otherwise in parts with as many numbers as fit beside the words."""
        fitting: list[int] = []
        first = True
        for index in range(self.words, len(self.header)):
            if fitting and _width(self._part("", [*fitting, index])._least()) > options.max_width:
                yield self._part(self.title if first else "", fitting)._rich(options.max_width)
                fitting, first = [], False
            fitting.append(index)
        yield self._part(self.title if first else "", fitting)._rich(options.max_width)
        if self.note:
            yield plain(f"{self.note}\n")

    def _part(self, title: str, numbers: Sequence[int]) -> "Table":
        columns = [*range(self.words), *numbers]
        header, *lines = ([printable(line[index]) for index in columns] for line in (self.header, *self.lines))
        return Table(title, header, lines, self.words, cut=self.cut)

    def _natural(self) -> list[int]:
        """The columns' widths without folding."""
        return [max(map(cell_len, column)) for column in zip(self.header, *self.lines, strict=True)]

    def _least(self) -> list[int]:
        """The least widths of columns: numbers are not folded, and their headings only between words."""
        least = [min(width, WORD_COLUMNS) for width in self._natural()]
        for index in range(self.words, len(self.header)):
            cells = max((cell_len(line[index]) for line in self.lines), default=0)
            heading = max(map(cell_len, self.header[index].split()), default=0)
            least[index] = max(cells, min(heading, WORD_COLUMNS))
        return least

    def _widths(self, limit: int) -> list[int]:
        """The columns' widths: the least, then the remaining room is distributed evenly, last to the column that is cut."""
        widths, natural = self._least(), self._natural()
        for turn in ([name != self.cut for name in self.header], [True] * len(natural)):
            wanted = [most if may else least for least, most, may in zip(widths, natural, turn, strict=True)]
            while _width(widths) < limit and widths != wanted:
                for index, most in enumerate(wanted):
                    widths[index] += widths[index] < most and _width(widths) < limit
        return widths

    def _rich(self, limit: int) -> RichTable:
        widths = self._widths(limit)
        title = plain(self.title) if self.title else None
        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, (name, width) in enumerate(zip(self.header, widths, strict=True)):
            justify = "left" if index < self.words else "right"
            cut = name == self.cut
            overflow = "ellipsis" if cut else "fold"
            table.add_column(Text(name), justify=justify, overflow=overflow, no_wrap=cut, width=width)  # type: ignore[arg-type]
        for line in self.lines:
            # Numbers are padded here: rich would strip the space behind them.
            cells = [
                Text(cell) if index < self.words else Text(" " * (width - cell_len(cell)) + cell, justify="left")
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            table.add_row(*cells)
        return table


def _width(columns: Sequence[int]) -> int:
    """The width of a table with such columns: three characters between any two, and one on either side."""
    return sum(columns) + 3 * (len(columns) - 1) + 2
