"""Rows of results as CSV, and back."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.config.text import GENERIC
from megatron_specialm.report.costs import COSTS, COUNTS, SPECIALIZATION

WORDS = ("method", "stage", "domain", "base_domain", "domain_text", "devices", "model")  # a domain may be named `1984`
NEEDED = (
    "method", "stage", "domain", "base_domain", "size", "finetuned", "domain_text", "nll", "perplexity",
    *(f"{phase}_{what}" for phase in (GENERIC, SPECIALIZATION) for what in dict.fromkeys((*COSTS, *COUNTS))),
    "total_flops_1", "fill", "devices", "inference_parameters", "seed",
)  # fmt: skip


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row, with every column that any row has; nothing where a row lacks it."""
    columns = dict.fromkeys(key for row in rows for key in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file that `to_csv` has made, with numbers, truth values and None as such.

    Raises:
        ArtifactError: the file is not there, or lacks a column that tables are made of, or a line has too few or too many.
    """
    try:
        header, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from None
    except (csv.Error, ValueError) as error:  # no line at all, or no text
        raise ArtifactError(f"{path}: not the CSV file of some results ({error})") from None
    if missing := [name for name in NEEDED if name not in header]:
        raise ArtifactError(f"{path}: its first line lacks {', '.join(missing)}: make it again from `results.json`")
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise ArtifactError(f"{path}: line {number} has {len(line)} columns, and the first one {len(header)}")
    rows = [{name: _value(name, cell) for name, cell in zip(header, line, strict=True)} for line in lines]
    check_rows(path, rows, remedy="make it again from `results.json`")
    return rows


def check_rows(path: Path, rows: Sequence[Mapping[str, Any]], *, remedy: str) -> None:
    """Refuse rows of a file of results that tables cannot be made of.

    Raises:
        ArtifactError: one has no perplexity, or a word where a number belongs, or the other way round.
    """
    for number, row in enumerate(rows):
        for name in row.keys() & set(NEEDED):
            if isinstance(row[name], str) != (name in WORDS) and row[name] is not None:
                raise ArtifactError(f"{path}: row {number}: {name} is {row[name]!r:.60}: {remedy}")
        if row.get("nll") is None or row.get("perplexity") is None:
            raise ArtifactError(f"{path}: row {number} has no perplexity: {remedy}")


def _value(name: str, cell: str) -> Any:
    if name in WORDS:
        return cell
    if cell in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[cell]
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell
