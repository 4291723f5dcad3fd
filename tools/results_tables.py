"""Generate the documentation's tables of results from a CSV file that is committed beside them.

    python tools/results_tables.py write-csv RUN_FOLDER... --output CSV [--keep CSV] [--concentration FILE]
    python tools/results_tables.py fill README.md docs/results.md [--check]
    python tools/results_tables.py draw CSV NAME... --output FOLDER [--domains legal,speeches]

`write-csv` collects the `results.json` of one config's run folders, one per seed: an unmodified line per seed, method, stage
and set, with numbers of six digits. `--keep` adds the rows of other seeds from such a file, which may be the output. Each seed
must have every model. `--concentration` collects how concentrated and how far the sets are. `fill` renders tables from such a
file between two comments of a Markdown file:

    <!-- table: docs/results/quickstart.csv perplexity -->
    <!-- end of table -->

Behind a table's name may be domains, as in `orders legal,speeches`: then only these are in it, and averages are over them.
`draw` writes the figures of these names (`megatron_specialm/report/figures.py` has the names) as SVG. Paths are relative to the
current folder. With `--check` nothing is written, and a file whose tables differ from the CSV file is
an error. Tables, over all seeds of the file (mean ± sample standard deviation):

    perplexity     per method and state, for each set and on average
    cost           for the same lines, of the generic and the specialization phase
    short          for fine-tuned models: perplexity, and the costs that matter for choosing a method
    orders         on how many seeds the methods are in the paper's order, and by how much
    orders-macro   the same, without the columns of single domains
    frontier       the best small model at each total cost, for 1, 7 and 50 domains
    concentration  of each set in clusters; from a file of `--concentration`
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_specialm.base.errors import ArtifactError, ConfigError, SpecialmError
from megatron_specialm.base.files import write_text
from megatron_specialm.base.printing import say
from megatron_specialm.base.terminal import Table
from megatron_specialm.report.figures import draw_figures
from megatron_specialm.report.frontier import frontier_table
from megatron_specialm.report.orders import orders_table
from megatron_specialm.report.results import results_from_rows
from megatron_specialm.report.rows import Concentration, Entry, Results, Row, Seeds, read_csv, to_csv
from megatron_specialm.report.seeds import merge_seeds, read_runs
from megatron_specialm.report.tables import concentration_table, is_tuned, results_in_two, results_table

Placed = TypeVar("Placed", Row, Concentration)

BLOCK = re.compile(
    r"^(<!-- table: (\S+) (\S+)(?: (\S+))? -->)\n(?:(?!<!--).)*?^(<!-- end of table -->)$", re.MULTILINE | re.DOTALL
)
DIGITS = 6


def short_table(results: Results) -> Table:
    """The fine-tuned models' perplexities and costs: tokens of both phases, seconds per domain."""
    tuned = [row for row in results.rows if is_tuned(row)]
    return results_table(replace(results, rows=tuned)).without(
        "fine-tuned", "gen. FLOPs", "gen. s", "spec. FLOPs", "fill"
    )


TABLES: dict[str, Callable[[Results], Table]] = {
    "perplexity": lambda results: results_in_two(merge_seeds(results))[0],
    "cost": lambda results: results_in_two(merge_seeds(results))[1],
    "short": lambda results: short_table(merge_seeds(results)),
    "orders": orders_table,
    "orders-macro": partial(orders_table, only_averages=True),
    "frontier": lambda results: frontier_table(merge_seeds(results)),
}
CONCENTRATION = "concentration"
NOT_RUN = "Not run yet.\n"  # in the place of a table whose file does not exist


def main() -> int:
    """Write the CSV file, or fill or check tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    writing = commands.add_parser("write-csv", help="collect the results of run folders")
    writing.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    writing.add_argument("--output", required=True, type=Path)
    writing.add_argument("--keep", type=Path, metavar="CSV", help="add its rows of other seeds, if it exists")
    writing.add_argument("--concentration", type=Path)
    filling = commands.add_parser("fill", help="render tables into Markdown files")
    filling.add_argument("pages", nargs="+", type=Path, metavar="PAGE")
    filling.add_argument("--check", action="store_true", help="write nothing; fail if a table differs")
    drawing = commands.add_parser("draw", help="draw figures of such a CSV file")
    drawing.add_argument("csv", type=Path, metavar="CSV")
    drawing.add_argument("names", nargs="+", metavar="NAME")
    drawing.add_argument("--output", required=True, type=Path)
    drawing.add_argument("--domains")
    arguments = parser.parse_args()
    try:
        if arguments.command == "draw":
            draw(arguments.csv, arguments.names, arguments.output, arguments.domains)
            return 0
        if arguments.command == "write-csv":
            write_csv(arguments.runs, arguments.output, keep=arguments.keep)
            if arguments.concentration is not None:
                write_concentration(arguments.runs, arguments.concentration)
            return 0
        return fill(arguments.pages, check=arguments.check)
    except SpecialmError as error:
        say(f"error: {error}", error=True)
        return error.exit_code


def write_csv(runs: Sequence[Path], output: Path, *, keep: Path | None = None) -> None:
    """Write the rows of all runs and those of other seeds in `keep`, in the order of seeds. A mean over fewer seeds would be
    mistaken for one over all: so each seed must have every model."""
    where = {row.seeds: folder for folder in runs for row in read_runs([folder / "results.json"]).rows}
    rows = read_runs([folder / "results.json" for folder in runs]).rows
    if keep is not None and keep.exists():
        rows += [row for row in read_csv(keep, Row) if row.seeds not in where]
    rows.sort(key=lambda row: row.seeds)
    models: dict[Seeds, dict[tuple[str, str], None]] = {row.seeds: {} for row in rows}
    for row in rows:
        models[row.seeds][row.stage, row.domain] = None
    for seeds, own in models.items():
        lacking = [model for other in models.values() for model in other if model not in own]
        if lacking:
            missing = ", ".join(f"{stage} on {domain}" for stage, domain in dict.fromkeys(lacking))
            raise ArtifactError(
                f"{where.get(seeds, keep)}: has no result of {missing}: `specialm run` its config to the end"
            )
    if not rows:
        raise ArtifactError(f"{', '.join(map(str, runs))}: nothing has been evaluated yet: `specialm run` the config")
    _write(output, rows)
    print(f"{output}: {len(rows)} rows of {len({row.seeds for row in rows})} runs")


def write_concentration(runs: Sequence[Path], output: Path) -> None:
    """Write how concentrated the sets are: the same for all training seeds of one `seed`."""
    entries = dict.fromkeys(read_runs([folder / "results.json" for folder in runs]).concentration)
    _write(output, list(entries))
    print(f"{output}: {len(entries)} rows")


def _write(output: Path, entries: Sequence[Entry]) -> None:
    write_text(output, to_csv([{key: rounded(value) for key, value in one.columns().items()} for one in entries]))


def rounded(value: Any) -> Any:
    """Round a fraction: further digits depend on the machine. Counts are unchanged."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def fill(pages: Sequence[Path], *, check: bool) -> int:
    """Render the tables of every file; returns 1 if `check` finds a difference."""
    differ = 0
    for page in pages:
        try:
            text = page.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{page}: {error.strerror}") from None
        filled = render(page, text)
        differ += filled != text
        if filled != text and check:
            print(
                "".join(difflib.unified_diff(*(part.splitlines(keepends=True) for part in (text, filled)), str(page)))
            )
            print(
                f"error: {page}: its tables are not those of the CSV file: `fill {page}` writes them", file=sys.stderr
            )
        elif filled != text:
            write_text(page, filled)
            print(f"{page}: written")
    return int(check and differ > 0)


def render(page: Path, text: str) -> str:
    """The text of a Markdown file with up-to-date tables."""
    found = len(BLOCK.findall(text))
    begun, ended = (len(re.findall(rf"^\s*<!-- *{word}", text, re.MULTILINE)) for word in ("table", "end of table"))
    if not found == begun == ended:
        raise ConfigError(
            f"{page}: of {begun} comments that begin a table and {ended} that end one, {found} are pairs with nothing but a "
            "table between them: write `<!-- table: FILE NAME -->`, and `<!-- end of table -->` behind it"
        )
    return BLOCK.sub(lambda block: f"{block[1]}\n\n{_content(page, block[2], block[3], block[4])}\n{block[5]}", text)


def _content(page: Path, path: str, name: str, domains: str | None) -> str:
    return table(page, path, name, domains).markdown() if Path(path).exists() else NOT_RUN


def table(page: Path, path: str, name: str, domains: str | None) -> Table:
    """The table that a comment names, of some domains (separated by commas) or all."""
    if name not in (*TABLES, CONCENTRATION):
        known = ", ".join((*TABLES, CONCENTRATION))
        raise ConfigError(f"{page}: there is no table {name!r} of {path}; there are {known}")
    if name == CONCENTRATION:
        entries = _of_domains(page, path, read_csv(Path(path), Concentration), domains)
        return concentration_table(replace(results_from_rows([]), concentration=entries))
    return TABLES[name](results_from_rows(_of_domains(page, path, read_csv(Path(path), Row), domains)))


def draw(source: Path, names: Sequence[str], output: Path, domains: str | None) -> None:
    """Write figures of a CSV file, of some domains (separated by commas) or all."""
    rows = _of_domains(source, str(source), read_csv(source, Row), domains)
    written = draw_figures(merge_seeds(results_from_rows(rows)), output, names=names, formats=["svg"])
    if missing := set(names) - {path.stem for path in written}:
        raise ConfigError(f"{source}: its results have no figure {', '.join(sorted(missing))}")
    for path in written:
        print(f"{path}: written")


def _of_domains(page: Path, path: str, entries: list[Placed], domains: str | None) -> list[Placed]:
    if domains is None:
        return entries
    wanted, known = domains.split(","), {entry.base_domain for entry in entries}
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"{page}: there is no domain {unknown[0]!r} in {path}; there are {', '.join(sorted(known))}")
    return [entry for entry in entries if entry.base_domain in wanted]


if __name__ == "__main__":
    sys.exit(main())
