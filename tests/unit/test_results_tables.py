"""The documentation's tables: what README.md and docs/ say is what the committed CSV file has, and how that is told."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.cli import app
from megatron_specialm.report.costs import COSTS, COUNTS
from megatron_specialm.report.frontier import find_frontier
from megatron_specialm.report.orders import orders_table
from megatron_specialm.report.results import results_from_rows, write_results
from megatron_specialm.report.rows import Concentration, Cost, Results, Row, read_csv, to_csv
from megatron_specialm.report.seeds import merge_seeds
from tests.conftest import ROOT
from tests.unit.test_figures import columns
from tests.unit.test_results import SMOKE, declare_finished

CSV = Path("docs/results/quickstart.csv")
FILLED = [Path("README.md"), Path("docs/results.md")]


@pytest.fixture(autouse=True)
def _tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_the_documentation_has_the_numbers_of_the_csv_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a number of a table was changed by hand, or the file without the tables."""
    from results_tables import BLOCK, fill

    monkeypatch.chdir(ROOT)
    pages = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
    assert fill(pages, check=True) == 0, "python tools/results_tables.py fill README.md docs/results.md"
    tables = {page: BLOCK.findall(page.read_text()) for page in FILLED}
    assert all(tables.values()) == CSV.exists(), f"README.md and docs/results.md have each a table of {CSV}"


# --- the file ---------------------------------------------------------------------------------------------------------


def made_up(perplexities: Mapping[str, Mapping[str, float]], *, seed: int = 0, **more: Any) -> list[Row]:
    """The rows of one seed: of stages named as the method, with `-tuned` behind where they are."""
    counts = {
        f"{phase}_{what}": 40 for phase in ("generic", "specialization") for what in dict.fromkeys((*COSTS, *COUNTS))
    }
    return [
        Row(**{
            "method": stage.removesuffix("-tuned"), "stage": stage, "domain": domain, "base_domain": domain, "size": None,
            "finetuned": stage.endswith("-tuned"), "domain_text": "none", "nll": math.log(value), "perplexity": value,
            **counts, "devices": "cpu", "inference_parameters": 7, "seed": seed, "model": f"{stage}/{domain}", **more,
        })
        for stage, of_domains in perplexities.items()
        for domain, value in of_domains.items()
    ]  # fmt: skip


def _csv(rows: list[Row]) -> str:
    return to_csv(row.columns() for row in rows)


def _run_folder(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir()
    Results("p", rows, [], [], [], []).write(folder / "results.json")
    return folder


def test_rows_come_back_from_csv(tmp_path: Path) -> None:
    """Numbers, truth values, None and words as they were; a domain named by a number. Columns that are not known yet are passed
    over, and those that a file lacks are None, or follow from others."""
    rows = made_up({"slm": {"legal": 12.5}, "slm-tuned": {"1984": 10.0}}, training_seed=3)
    rows[1] = replace(rows[1], capped=True, learning_rate=0.0017)
    (tmp_path / "rows.csv").write_text(_csv(rows))
    assert read_csv(tmp_path / "rows.csv", Row) == rows
    later = [{**row.columns(), "of_later": 7} for row in rows]
    (tmp_path / "rows.csv").write_text(to_csv(later))
    assert read_csv(tmp_path / "rows.csv", Row) == rows
    absent = ("learning_rate", "capped", "total_flops_7", "fill", "training_seed")
    (tmp_path / "rows.csv").write_text(to_csv({k: v for k, v in row.items() if k not in absent} for row in later))
    for row, again in zip(rows, read_csv(tmp_path / "rows.csv", Row), strict=True):
        assert again == replace(row, capped=None, learning_rate=None, training_seed=0)
        assert again.total_flops_7 == 40 + 7 * 40 and again.fill == 1.0


def test_a_file_that_is_no_results(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    whole = _csv(made_up({"slm": {"legal": 12.5}}))
    for text, says in (
        ("", "not the CSV file of some results"),
        (whole.replace("nll,perplexity", "nll,ppl"), "its first line lacks perplexity"),
        (f"{whole}slm,slm-tuned\n", "line 3 has 2 columns, and the first one"),
    ):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=rf"rows\.csv: {says}"):
            read_csv(path, Row)
    with pytest.raises(ArtifactError, match=r"absent\.csv: No such file"):
        read_csv(tmp_path / "absent.csv", Row)


def test_averages_from_rows_are_those_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sizes, from real rows, to the last bit; and from the CSV file to its digits."""
    from results_tables import write_csv

    monkeypatch.chdir(tmp_path)
    pipeline, root = declare_finished(tmp_path, "text.domains.torch.sizes=[1000, 5000]")
    results = write_results(pipeline, root)
    assert len(results.macro) > 20 and results_from_rows(results.rows).macro == results.macro
    write_csv([root], tmp_path / "rows.csv")
    again = results_from_rows(read_csv(tmp_path / "rows.csv", Row)).macro
    assert [entry.perplexity for entry in again] == pytest.approx(
        [entry.perplexity for entry in results.macro], rel=1e-4
    )
    assert str(tmp_path) not in (tmp_path / "rows.csv").read_text()


def test_runs_become_one_file_in_the_order_of_their_seeds(tmp_path: Path) -> None:
    from results_tables import write_csv

    levels = {"slm": {"legal": 12.3456789, "law": 20.0}}
    folders = [_run_folder(tmp_path / str(seed), made_up(levels, seed=seed)) for seed in (2, 0, 1)]
    write_csv(folders, tmp_path / "new" / "rows.csv")
    rows = read_csv(tmp_path / "new" / "rows.csv", Row)
    assert [row.seed for row in rows] == [0, 0, 1, 1, 2, 2] and rows[0].perplexity == 12.3457
    _run_folder(tmp_path / "3", made_up({"slm": {"legal": 10.0}}, seed=3))
    with pytest.raises(ArtifactError, match="3: has no result of slm on law"):
        write_csv([*folders, tmp_path / "3"], tmp_path / "rows.csv")
    with pytest.raises(ArtifactError, match="nothing has been evaluated"):
        write_csv([_run_folder(tmp_path / "4", [])], tmp_path / "rows.csv")
    assert not (tmp_path / "rows.csv").exists()


def test_rows_of_other_seeds_are_kept_if_asked(tmp_path: Path) -> None:
    """Run folders may be on another machine, or gone; the new folder's own seed is replaced."""
    from results_tables import write_csv

    def folder(seed: int, perplexity: float) -> Path:
        levels = {"slm": {"legal": perplexity, "law": 20.0}}
        return _run_folder(tmp_path / f"{seed}-{perplexity}", made_up(levels, seed=seed))

    output = tmp_path / "rows.csv"
    write_csv([folder(0, 10.0), folder(2, 12.0)], output, keep=output)
    before = output.read_text().splitlines()
    write_csv([folder(1, 11.0)], output, keep=output)
    after = output.read_text().splitlines()
    assert [line for line in after if line in before] == before and len(after) == len(before) + 2
    write_csv([folder(2, 13.0)], output, keep=output)
    assert [(row.seed, row.perplexity) for row in read_csv(output, Row) if row.domain == "legal"] == [
        (0, 10.0), (1, 11.0), (2, 13.0),
    ]  # fmt: skip
    more = _run_folder(tmp_path / "more", made_up({"slm": {"legal": 1.0, "law": 1.0}, "llm": {"legal": 1.0}}, seed=3))
    with pytest.raises(ArtifactError, match=r"rows\.csv: has no result of llm on legal"):
        write_csv([more], output, keep=output)
    write_csv([folder(4, 14.0)], output)
    assert {row.seed for row in read_csv(output, Row)} == {4}


def test_figures_of_a_file(tmp_path: Path) -> None:
    from results_tables import draw

    (tmp_path / "rows.csv").write_text(
        _csv(made_up({"slm": {"legal": 12.5, "law": 9}, "slm-tuned": {"legal": 10, "law": 8}}))
    )
    draw(tmp_path / "rows.csv", ["domains"], tmp_path / "new", "law")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["domains.svg"]
    with pytest.raises(ConfigError, match=r"rows\.csv: its results have no figure set-size"):
        draw(tmp_path / "rows.csv", ["set-size"], tmp_path, None)


@pytest.mark.parametrize("key", ["seed", "training_seed"])
def test_seeds_become_mean_and_deviation(key: str) -> None:
    """Of the whole, and of the trainings alone."""
    rows = [
        row
        for number, value in enumerate((100.0, 110.0, 120.0))
        for row in made_up({"slm": {"legal": value, "law": 100.0}}, **{key: number})
    ]
    merged = merge_seeds(results_from_rows(rows))
    assert [(row["domain"], row["perplexity"], row["perplexity_sd"]) for row in columns(merged.rows)] == [
        ("legal", 110.0, 10.0), ("law", 100.0, 0.0),
    ]  # fmt: skip
    (macro,) = columns(merged.macro)
    assert macro["perplexity"] == pytest.approx(sum(math.sqrt(100 * value) for value in (100, 110, 120)) / 3)
    assert macro[f"{key}s"] == [0, 1, 2]


@dataclass(frozen=True, kw_only=True)
class _Wider(Row):
    joules: Cost = 0


def test_a_new_column_is_a_field() -> None:
    """In files and over seeds, with no change but the field and its value."""
    rows = [_Wider(**_given(row), joules=10 * (number + 1)) for number in range(2) for row in made_up(
        {"slm": {"legal": 100.0}}, seed=number)]  # fmt: skip
    assert _csv(rows).splitlines()[0].endswith(",imported,joules") and _csv(rows).splitlines()[2].endswith(
        ",slm/legal,,20"
    )
    (merged,) = columns(merge_seeds(results_from_rows(rows)).rows)
    assert merged["joules"] == 15.0 and "joules_sd" not in merged


def _given(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.columns().items() if name != "fill"}


# --- orders -----------------------------------------------------------------------------------------------------------


def test_orders_hold_on_so_many_seeds_and_by_so_much() -> None:
    rows = [
        *made_up({"slm-tuned": {"legal": 100, "law": 400}, "slm-pn-tuned": {"legal": 90, "law": 400}}),
        *made_up({"slm-tuned": {"legal": 100, "law": 400}, "slm-pn-tuned": {"legal": 105, "law": 100}}, seed=1),
        *made_up({"slm-tuned": {"legal": 50}}, seed=2),
        *made_up({"slm": {"legal": 125}}),
    ]
    pn = ["1 of 2, -2.5% (-10.0 to +5.0)", "1 of 2, -37.5% (-75.0 to +0.0)", "2 of 2, -26.9% (-48.8 to -5.1)"]
    smaller = replace(rows[0], stage="slm-short-tuned", perplexity=1.0, total_flops_1=79)
    tables = [orders_table(results_from_rows(own)) for own in (rows, [*rows, smaller])]
    for table in tables:
        assert table.header == ["order", "legal", "law", "macro"]
        assert table.lines == [
            ["slm-pn < slm", *pn],  # on average sqrt(90 * 400) / 200 and sqrt(105 * 100) / 200
            ["slm: fine-tuned < not", "1 of 1, -20.0%", "", ""],
        ]  # fmt: skip


def test_orders_of_sizes_have_an_average_each() -> None:
    rows = [
        replace(row, size=size, domain=f"legal-{size}")
        for size, level in ((50_000, 90.0), (1_000_000, 80.0))
        for row in made_up({"llm-tuned": {"legal": level}, "slm-tuned": {"legal": 100.0}})
    ]
    table = orders_table(results_from_rows(rows))
    assert table.header == ["order", "legal-50000", "legal-1000000", "macro 50k", "macro 1m"]
    assert table.lines == [["llm < slm", "1 of 1, -10.0%", "1 of 1, -20.0%", "1 of 1, -10.0%", "1 of 1, -20.0%"]]


def test_seeds_and_orders_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline, root = declare_finished(tmp_path)
    write_results(pipeline, root)
    other = json.loads((root / "results.json").read_text())
    for part in ("rows", "macro", "concentration"):
        other[part] = [{**entry, "seed": 1} for entry in other[part]]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(other))
    for options, says in (
        (["--markdown"], "| slm | no | "),
        (["--markdown", "--runs", "other"], " ± 0.0 | "),
        (["--orders"], "slm: fine-tuned < not"),
        (["--orders", "--markdown", "--runs", "other"], "| slm-pn < slm | 0 of 2, +"),
    ):
        outcome = CliRunner().invoke(app, ["results", str(SMOKE), f"root={root}", *options])
        assert outcome.exit_code == 0 and says in outcome.output, outcome.output


# --- pages ------------------------------------------------------------------------------------------------------------

PAGE = """Before; `<!-- table: FILE NAME -->` is a mention.

<!-- table: rows.csv {name} -->
{table}<!-- end of table -->

Behind.
"""


def test_a_page_is_filled_once_and_a_changed_number_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from results_tables import TABLES, fill

    monkeypatch.chdir(tmp_path)
    levels = {"slm": {"generic": 200.0, "legal": 150.0}, "slm-tuned": {"legal": 100.0}, "slm-pn-tuned": {"legal": 80.0}}
    rows = [row for seed in (0, 1) for row in made_up(levels, seed=seed)]
    rows = [replace(row, domain_text="fine-tuned" if row.finetuned else "none") for row in rows]
    Path("rows.csv").write_text(_csv(rows))
    page = Path("page.md")
    for name, line in (
        ("perplexity", "| slm | no | 200.0 ± 0.0 | 150.0 ± 0.0 | 150.0 ± 0.0 |"),
        ("cost", "| slm | yes | 0.00M | 4.0e+01 | 40 | 0.00M | 4.0e+01 | 40 | 100% |"),
        ("short", "| slm | 100.0 ± 0.0 | 100.0 ± 0.0 | 0.00M | 0.00M | 40 |"),
        ("orders", "| slm-pn < slm | 2 of 2, -20.0% (-20.0 to -20.0) | 2 of 2, -20.0% (-20.0 to -20.0) |"),
        ("orders-macro", "| slm-pn < slm | 2 of 2, -20.0% (-20.0 to -20.0) |"),
        ("frontier", "| 7 |  | slm-pn | yes | slm-pn-tuned | 3.2e+02 | 80.0 ± 0.0 |"),
    ):
        page.write_text(PAGE.format(name=name, table=""))
        assert fill([page], check=True) == 1 and fill([page], check=False) == 0
        filled = page.read_text()
        assert line in filled.splitlines() and filled.startswith("Before; ") and filled.endswith("Behind.\n")
        assert fill([page], check=True) == 0 and fill([page], check=False) == 0 and page.read_text() == filled
        page.write_text(filled.replace(line, line.replace("0", "1", 1)))
        capsys.readouterr()
        assert fill([page], check=True) == 1 and f"+{line}" in capsys.readouterr().out
        assert fill([page], check=False) == 0 and page.read_text() == filled
    assert set(TABLES) == {"perplexity", "cost", "short", "orders", "orders-macro", "frontier"}


def test_a_table_of_some_domains_averages_over_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from results_tables import fill

    monkeypatch.chdir(tmp_path)
    levels = {"slm-tuned": {"generic": 9.0, "legal": 100.0, "law": 400.0, "news": 7.0}}
    Path("rows.csv").write_text(_csv(made_up(levels)))
    Path("page.md").write_text(PAGE.format(name="short legal,law", table=""))
    assert fill([Path("page.md")], check=False) == 0
    assert "| slm | 100.0 | 400.0 | 200.0 | 0.00M | 0.00M | 40 |" in Path("page.md").read_text()
    Path("page.md").write_text(PAGE.format(name="short", table="").replace("rows.csv", "absent.csv"))
    assert fill([Path("page.md")], check=False) == 0 and "-->\n\nNot run yet.\n\n<!--" in Path("page.md").read_text()
    Path("page.md").write_text(PAGE.format(name="short legal,laws", table=""))
    with pytest.raises(
        ConfigError, match=r"page\.md: there is no domain 'laws' in rows\.csv; there are generic, law, legal"
    ):
        fill([Path("page.md")], check=False)


def test_concentration_is_one_file_for_all_training_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from results_tables import fill, write_concentration

    monkeypatch.chdir(tmp_path)
    place = {"stage": "assignment", "domain": "legal", "base_domain": "legal", "size": None, "k": 4, "windows": 10}
    entry = Concentration(**place, top_share=0.25, entropy=1.0, effective_clusters=2.5, relative_distance=1.1, seed=0)
    for seed in (0, 1):
        Path(str(seed)).mkdir()
        results = Results("p", made_up({"slm": {"legal": 9.0}}, training_seed=seed), [], [entry], [], [])
        results.write(Path(str(seed), "results.json"))
    write_concentration([Path("0"), Path("1")], Path("rows.csv"))
    Path("page.md").write_text(PAGE.format(name="concentration", table=""))
    assert fill([Path("page.md")], check=False) == 0
    assert "| assignment | legal | 4 | 10 | 0.25 | 1.00 | 2.5 | 1.10 |" in Path("page.md").read_text()


def test_the_frontier_has_the_best_small_model_at_each_total_cost() -> None:
    """Not a larger model, nor one that a cheaper one beats; with more domains the specialization costs weigh more."""
    costs = {
        "slm-tuned": (1_000, 10, 20.0),
        "slm-is": (0, 200, 15.0),
        "slm-mix": (2_000, 20, 22.0),
        "llm": (10, 1, 5.0),
    }
    rows = [
        replace(row, generic_flops=generic, specialization_flops=own, total_flops_1=None, total_flops_7=None,
                total_flops_50=None, inference_parameters=1 + (row.stage == "llm"))
        for stage, (generic, own, level) in costs.items()
        for row in made_up({stage: {"legal": level}})
    ]  # fmt: skip
    found = [(best.domains, best.average.stage) for best in find_frontier(results_from_rows(rows))]
    assert found == [(1, "slm-is"), (7, "slm-tuned"), (7, "slm-is"), (50, "slm-tuned"), (50, "slm-is")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PAGE.format(name="other", table=""), "no table 'other' of rows.csv; there are perplexity, cost, short, orders, "),
        ("<!-- table: rows.csv cost -->\n", "of 1 comments that begin a table and 0 that end one, 0 are pairs"),
        (PAGE.format(name="cost", table="") + "<!-- end of table -->\n", "1 comments .* and 2 that end one, 1 are pairs"),
        (PAGE.format(name="cost", table="").replace("table: ", "table "), "1 comments .* and 1 that end one, 0 are pairs"),
        (" " + PAGE.format(name="cost", table="").partition("\n\n")[2], "1 comments .* and 1 that end one, 0 are pairs"),
        (PAGE.format(name="cost", table="<!-- table: rows.csv short -->\n"), "2 comments .* 1 that end one"),
    ],
)  # fmt: skip
def test_comments_that_are_no_pair(text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from results_tables import fill

    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text(_csv(made_up({"slm": {"legal": 12.5}})))
    Path("page.md").write_text(text)
    with pytest.raises(ConfigError, match=rf"page\.md: .*{says}"):
        fill([Path("page.md")], check=False)
    assert Path("page.md").read_text() == text
