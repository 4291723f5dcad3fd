"""Figures and tables from invented rows: what is drawn, what it says, and what seeds add up to."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from megatron_specialm.base.errors import ArtifactError
from megatron_specialm.report.drawing import (
    Curve,
    Look,
    apart,
    looks,
    new_figure,
    number,
    our_style,
    plot,
    round_numbers,
)
from megatron_specialm.report.figures import _figures, draw
from megatron_specialm.report.rows import Entry, Results
from megatron_specialm.report.seeds import merge_seeds, read_runs
from megatron_specialm.report.tables import concentration_table, rates_table, results_table, selection_table

SIZES = {None: 1.0, 50_000: 1.3, 200_000: 1.0, 1_000_000: 0.8}  # factors of perplexity
DOMAINS = {"legal": 0.8, "speeches": 1.0, "encyclopedia": 1.25}
# method: (perplexity before fine-tuning, after), generic FLOPs, specialization FLOPs, per budget
METHODS: dict[str, list[tuple[float | None, float, float, float]]] = {
    "slm": [(130, 108, 5e12, 1.3e12), (101, 91, 1.5e13, 1.3e12), (88, 80, 4.5e13, 1.4e12)],
    "slm-nopt": [(None, 200, 0, 3.8e12)],
    "slm-is": [(72, 70, 5.7e10, 5.5e12), (57.5, 57.4, 5.7e10, 1.6e13), (50, 49, 5.7e10, 4.7e13)],
    "slm-mix": [(112, 96, 1.6e13, 1.5e12), (90, 79, 4.8e13, 1.5e12), (77, 70, 1.5e14, 1.5e12)],
    "slm-pn": [(109, 93, 1.2e13, 1.4e12), (88, 77, 3.6e13, 1.4e12), (76, 69, 1.1e14, 1.4e12)],
    "slm-d": [(None, 86, 6.5e13, 2.9e12), (None, 75, 1.9e14, 3.1e12)],
    "llm": [(95, 82, 5.2e13, 6.0e12), (80, 66, 1.6e14, 6.2e12)],
    "llm-lora": [(95, 84, 5.2e13, 9.0e12), (80, 67, 1.6e14, 9.1e12)],
}


def invented(
    *,
    seed: int = 0,
    sizes: tuple[int | None, ...] = (None,),
    methods: tuple[str, ...] = tuple(METHODS),
    capped: tuple[str, ...] = (),
) -> Any:
    """The JSON of results of a config with these methods and sizes; of the `capped` methods all fine-tunings are."""
    rows = [
        {**row, "capped": row["method"] in capped if row["finetuned"] else None} for row in _rows(seed, sizes, methods)
    ]
    macro = []
    for key in dict.fromkeys((row["method"], row["finetuned"], row["stage"], row["size"]) for row in rows):
        own = [row for row in rows if (row["method"], row["finetuned"], row["stage"], row["size"]) == key]
        entry = {name: value for name, value in own[0].items() if name not in ("domain", "base_domain", "nll")}
        perplexity = math.exp(sum(row["nll"] for row in own) / len(own))
        macro.append({**entry, "domains": len(own), "perplexity": perplexity})
    concentration = [
        {"stage": "assignment", "domain": domain, "base_domain": domain, "size": None, "k": 64, "windows": 400,
         "top_share": 0.5 + seed / 10, "entropy": 1.5, "effective_clusters": math.exp(1.5), "seed": seed}
        for domain in DOMAINS
    ]  # fmt: skip
    selection = [
        {"method": "slm-mix", "stage": "expert", "domain": "legal", "base_domain": "legal", "size": None,
         "choice": "c3", "by": "loss", "criterion": criterion, "criterion_choice": choice, "rank": rank,
         "tokens": tokens, "flops": 2.5e9, "seed": seed}
        for criterion, choice, rank, tokens in (("loss", "c3", 1, 65_536), ("frequency", "c1", 2, 0))
    ]  # fmt: skip
    learning_rates = [
        {"method": "slm", "stage": "slm-0-tuned", "domain": "legal", "base_domain": "legal", "size": None,
         "choice": 0.0017, "untried": "higher", "learning_rate": rate, "validation_loss": loss, "seed": seed}
        for rate, loss in ((0.0005, 3.14), (0.0017, 3.102), (0.001, None))
    ]  # fmt: skip
    return {
        "pipeline": "arena", "rows": rows, "macro": macro, "concentration": concentration, "selection": selection,
        "learning_rates": learning_rates,
    }  # fmt: skip


def typed(results: Any) -> Results:
    """The same as `write_results` returns them."""
    return TypeAdapter(Results).validate_python(results)


def columns(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """The entries as they stand in files."""
    return [entry.columns() for entry in entries]


def _rows(seed: int, sizes: tuple[int | None, ...], methods: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for method in methods:
        for budget, (before, after, generic, specialization) in enumerate(METHODS[method]):
            for finetuned, level in ((False, before), (True, after)):
                for size in sizes:
                    for domain, factor in DOMAINS.items():
                        if level is None:
                            continue
                        steep = {"slm-nopt": 3, "slm-is": 0.3}.get(method, 1) if finetuned else 0
                        noise = 1 + 0.03 * seed * (-1) ** len(domain)
                        perplexity = level * factor * SIZES[size] ** steep * noise
                        costs = {
                            "generic_tokens": 0, "specialization_tokens": 0, "fill": None,
                            "generic_slots": 0, "specialization_slots": 0,
                            "generic_flops": generic, "specialization_flops": specialization,
                            "generic_device_seconds": 2 + generic / 5e10,
                            "specialization_device_seconds": specialization / 4e10,
                        }  # fmt: skip
                        totals = {
                            f"total_{what}_{tasks}": costs[f"generic_{what}"] + tasks * costs[f"specialization_{what}"]
                            for what in ("flops", "device_seconds")
                            for tasks in (1, 7, 50)
                        }
                        yield {
                            "method": method, "stage": f"{method}-{budget}{'-tuned' * finetuned}",
                            "domain": domain if size is None else f"{domain}-{size}", "base_domain": domain, "size": size,
                            "finetuned": finetuned, "domain_text": ("none", "fine-tuned")[finetuned],
                            "nll": math.log(perplexity), "perplexity": perplexity,
                            "tokens_evaluated": 40_000, "learning_rate": 3e-3 if seed == 2 else 1e-3, **costs, **totals,
                            "devices": "cpu", "inference_parameters": 3_000_000, "seed": seed, "model": "m",
                        }  # fmt: skip


FEW = ("slm", "slm-nopt", "slm-is", "llm-lora")
COST_FIGURES = {f"{kind}-cost-{what}" for kind in ("generic", "specialization", "total") for what in ("flops", "hours")}


def _written(paths: list[Path]) -> set[str]:
    assert all(path.stat().st_size > 100 for path in paths)
    return {path.name for path in paths}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What is drawn of a few methods. Tests only read it."""
    folder = tmp_path_factory.mktemp("few")
    paths = draw(typed(invented(methods=FEW)), folder)
    assert all(path.parent == folder / "figures" for path in paths)
    return paths


def test_figures_name_methods_and_units(few: list[Path]) -> None:
    folder = few[0].parent
    names = {*COST_FIGURES, "domains"}
    tables = {
        f"{name}.{form}"
        for name in ("results", "concentration", "selection", "learning_rates")
        for form in ("md", "csv")
    }
    assert _written(few) == {f"{name}.{form}" for name in names for form in ("png", "svg")} | tables
    for name, says in (
        ("generic-cost-flops", "generic training cost (FLOPs)"),
        ("specialization-cost-hours", "specialization training cost (device-hours on cpu)"),
        ("total-cost-flops", "50 domains"),
        ("domains", "encyclopedia"),
    ):
        svg = (folder / f"{name}.svg").read_text()
        for word in (*FEW, says, "perplexity"):
            assert word in svg, f"{name} lacks {word}"
        assert CAPPED not in svg
    assert (folder / "domains.png").read_bytes().startswith(b"\x89PNG")


def test_what_cost_nothing_is_said_to(few: list[Path]) -> None:
    assert "slm-nopt (at no cost)" in few[0].with_name("generic-cost-flops.svg").read_text()


CAPPED = "ended by the cap on steps,"


@pytest.mark.parametrize("sizes", [(None,), (50_000, 1_000_000)])
def test_what_the_cap_ended_is_ringed_in_every_figure(tmp_path: Path, sizes: tuple[int | None, ...]) -> None:
    drawn = draw(typed(invented(methods=("slm", "slm-nopt"), sizes=sizes, capped=("slm-nopt",))), tmp_path)
    figures = [path for path in drawn if path.suffix == ".svg"]
    assert len(figures) >= 7 and all(CAPPED in path.read_text() for path in figures)


def test_the_words_below_domains_are_not_cut() -> None:
    results = typed(invented(methods=FEW, capped=FEW))
    rows = [row for row in results.rows if row.domain == "legal"]
    with our_style():
        (figure,) = (figure for name, figure in _figures(replace(results, rows=rows, macro=[])) if name == "domains")
        figure.draw_without_rendering()
        (words,) = (text for text in figure.texts if CAPPED in text.get_text())
        box = words.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_rings_stand_around_their_points() -> None:
    look = Look("#0072B2", "o")
    paid, free = (
        Curve("a", [1.0, 2.0, 4.0], [9.0, 8.0, 7.0], [None] * 3, [True, False, True]),
        Curve("b", [0.0], [5.0], [None], [True]),
    )
    with our_style():
        axes = new_figure(1, 1, panel=(3, 3)).axes[0]
        plot(axes, paid, look)
        plot(axes, free, look)
        rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
        assert [tuple(line.get_ydata()) for line in rings] == [(9.0,), (7.0,), (5.0,)]
        assert [tuple(line.get_xdata()) for line in rings[:2]] == [(1.0,), (4.0,)]


def test_sizes_have_figures_of_their_own(tmp_path: Path) -> None:
    names = _written(draw(typed(invented(methods=("slm", "slm-is"), sizes=(50_000, 1_000_000))), tmp_path))
    assert {"set-size.svg", "domains-by-size.png"} <= names and "domains.png" not in names
    svg = (tmp_path / "figures" / "set-size.svg").read_text()
    for word in ("50k", "1m", "slm-is", "training tokens of the domain", "macro perplexity"):
        assert word in svg
    assert "7 domains, 50k tokens" in (tmp_path / "figures" / "total-cost-flops.svg").read_text()


def test_what_there_is_nothing_of_is_left_out(tmp_path: Path) -> None:
    assert draw(Results("arena", [], [], [], [], []), tmp_path) == []
    results = replace(typed(invented(methods=("slm",))), selection=[], learning_rates=[], macro=[])
    assert {path.stem for path in draw(results, tmp_path)} == {"domains", "results", "concentration"}


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    results = replace(typed(invented(methods=("slm",))), macro=[])
    for first, second in zip(draw(results, tmp_path / "a"), draw(results, tmp_path / "b"), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_methods_keep_their_looks() -> None:
    alone, together = looks(["slm-is"]), looks([*METHODS, "slm-pn-soup", "another"])
    assert alone["slm-is"] == together["slm-is"]
    assert len(set(together.values())) == len(together) == len({look.marker for look in together.values()})


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1e10, 1e13, [1e10, 1e11, 1e12, 1e13]), (40, 300, [50, 100, 200]), (57, 60.5, [57, 58, 59, 60])],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert round_numbers(low, high) == pytest.approx(ticks)


def test_ticks_side_by_side_have_room() -> None:
    assert apart([1.5, 2.0, 3.0, 5.0, 7.0], by=(8.5 / 1.25) ** 0.2) == [1.5, 3.0, 5.0]


def test_numbers_of_ticks() -> None:
    assert [number(value) for value in (0.03, 50.0, 1500.0, 1e13, 3e12)] == [
        "0.03", "50", "1500", "$10^{13}$", r"$3\times10^{12}$",
    ]  # fmt: skip


def test_nothing_draws_before_it_is_asked_to() -> None:
    program = "import sys, megatron_specialm.cli, megatron_specialm.report.figures; print('matplotlib' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_figures_are_the_same_in_any_environment(tmp_path: Path) -> None:
    """A notebook's backend, a display that is not there, settings of the user's own figures, no home and no cache."""
    (tmp_path / "results.json").write_text(json.dumps(invented(methods=("slm", "llm"))))
    rc = tmp_path / "rc" / "matplotlibrc"
    rc.parent.mkdir()
    rc.write_text("text.usetex: True\nsavefig.dpi: 10\nfont.family: Nowhere\n")
    hostile = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline", "DISPLAY": ":77", "HOME": "/nonexistent",
        "MATPLOTLIBRC": str(rc), "MPLCONFIGDIR": "/proc/nowhere",
    }  # fmt: skip
    program = (
        "import sys; from pathlib import Path; from megatron_specialm.report.figures import draw\n"
        "from megatron_specialm.report.seeds import read_runs\n"
        "draw(read_runs([Path('results.json')]), Path(sys.argv[1]))"
    )
    drawn = []
    for name, variables in (("plain", {}), ("hostile", hostile)):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
        command = [sys.executable, "-c", program, name]
        outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stderr
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / name / "figures").iterdir()})
    assert any(name.endswith(".svg") for name in drawn[0]) and drawn[0] == drawn[1]


# --- seeds ------------------------------------------------------------------------------------------------------------


def _read(folder: Path, *results: Any) -> Results:
    paths = [folder / f"{number}.json" for number in range(len(results))]
    for path, content in zip(paths, results, strict=True):
        path.write_text(json.dumps(content))
    return read_runs(paths)


def _merged(folder: Path, *results: Any) -> Results:
    return merge_seeds(_read(folder, *results))


def test_seeds_give_mean_and_sample_deviation(tmp_path: Path) -> None:
    merged = _merged(tmp_path, *(invented(seed=seed, methods=FEW) for seed in (0, 1, 2)))
    row = next(row for row in columns(merged.rows) if (row["stage"], row["domain"]) == ("slm-1-tuned", "speeches"))
    # 91 at seed 0, and 3% more per seed: 91, 93.73, 96.46.
    assert row["perplexity"] == pytest.approx(93.73) and row["perplexity_sd"] == pytest.approx(2.73)
    assert row["seeds"] == [0, 1, 2] and "seed" not in row
    # Macro: the mean of the seeds' own averages. `legal` has an odd name and goes down where the others go up.
    at = [91 * ((1 + 0.03 * seed) ** 2 * (1 - 0.03 * seed)) ** (1 / 3) for seed in (0, 1, 2)]
    mean = sum(at) / 3
    entry = next(entry for entry in columns(merged.macro) if entry["stage"] == "slm-1-tuned")
    assert entry["perplexity"] == pytest.approx(mean)
    assert entry["perplexity_sd"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in at) / 2))
    assert entry["generic_flops"] == 1.5e13
    assert [entry["top_share"] for entry in columns(merged.concentration)] == pytest.approx([0.6] * 3)
    assert row["learning_rate"] == "0.001, 0.003" == entry["learning_rate"]  # no mean: the seeds chose differently
    assert len(rates_table(merged).lines) == 9 and rates_table(merged).lines[1][2:4] == ["0", "yes; higher not tried"]
    assert {path.suffix for path in draw(merged, tmp_path)} == {".png", ".svg", ".md", ".csv"}
    assert "93.7 ± 2.7" in results_table(merged).markdown()
    assert "0.60 ± 0.10" in concentration_table(merged).markdown()


def test_what_is_capped_at_any_seed_is_marked(tmp_path: Path) -> None:
    capped: dict[int, tuple[str, ...]] = {0: (), 1: ("slm",), 2: ("slm",)}
    runs = [invented(seed=seed, methods=FEW, capped=methods) for seed, methods in capped.items()]
    merged = _merged(tmp_path, *runs)
    for part in ("rows", "macro"):
        found = {entry["stage"]: (entry["capped"], entry["capped_seeds"]) for entry in columns(getattr(merged, part))}
        assert found["slm-1-tuned"] == (True, [1, 2]) and found["slm-is-1-tuned"] == (False, [])
        assert found["slm-1"] == (None, [])
    assert not any("capped" in entry for entry in columns(merged.concentration))
    table = results_table(merged)
    assert "93.7 ± 2.7*" in table.markdown()
    assert table.note.endswith("slm-0-tuned (seeds 1, 2), slm-1-tuned (seeds 1, 2), slm-2-tuned (seeds 1, 2)")


def _training_seed(number: int) -> Any:
    """Results of one seed of text and clusters, with another seed of trainings."""
    results, other = invented(methods=FEW), invented(seed=number, methods=FEW)
    for part in ("rows", "macro", "selection"):
        results[part] = [{**entry, "seed": 0, "training_seed": number} for entry in other[part]]
    return results


def test_seeds_of_trainings_are_seeds_but_not_of_clusters(tmp_path: Path) -> None:
    merged = _merged(tmp_path, *(_training_seed(number) for number in (2, 0, 1)))
    row = next(row for row in columns(merged.rows) if (row["stage"], row["domain"]) == ("slm-1-tuned", "speeches"))
    assert row["perplexity"] == pytest.approx(93.73) and row["perplexity_sd"] == pytest.approx(2.73)
    assert (
        row["seeds"] == [0, 0, 0] and row["training_seeds"] == [0, 1, 2] and not {"seed", "training_seed"} & row.keys()
    )
    # The same clusters in all: one sample, which has no spread.
    assert {(entry["top_share"], entry["top_share_sd"]) for entry in columns(merged.concentration)} == {(0.5, None)}
    assert [entry["seeds"] for entry in columns(merged.concentration)] == [[0]] * 3
    assert "±" not in concentration_table(merged).markdown()
    selection = selection_table(merged)
    assert selection.header[2] == "training seed" and [line[2] for line in selection.lines] == [
        "2",
        "2",
        "0",
        "0",
        "1",
        "1",
    ]
    both = _merged(tmp_path, invented(methods=FEW), _training_seed(1), invented(seed=1, methods=FEW))
    assert [entry["top_share_sd"] for entry in columns(both.concentration)] == pytest.approx([0.1 / math.sqrt(2)] * 3)
    assert {tuple(row["training_seeds"]) for row in columns(both.rows)} == {(0, 1, 1)}


def test_a_single_seed_has_no_deviation(tmp_path: Path) -> None:
    merged = _merged(tmp_path, invented(seed=3, methods=("slm",)))
    assert {row["perplexity_sd"] for row in columns(merged.rows)} == {None}
    assert "±" not in results_table(merged).markdown()


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    one = invented(methods=("slm",))
    with pytest.raises(ArtifactError, match=r"1\.json: seed 0 and training_seed 0 are those of .*0\.json too"):
        _read(tmp_path, one, one)
    with pytest.raises(ArtifactError, match=r"of the config 'other', and .* of 'arena'"):
        _read(tmp_path, one, {**invented(seed=1, methods=("slm",)), "pipeline": "other"})
    with pytest.raises(ArtifactError, match="macro: Field required"):
        _read(tmp_path, {"pipeline": "arena", "rows": []})
    with pytest.raises(ArtifactError, match="no such file"):
        read_runs([tmp_path / "absent" / "results.json"])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_side_tables() -> None:
    results = typed(invented(methods=("slm",)))
    concentration, selection = concentration_table(results), selection_table(results)
    assert concentration.lines[0] == ["assignment", "legal", "64", "400", "0.50", "1.50", "4.5", ""]
    assert selection.lines == [
        ["expert", "legal", "loss", "yes", "c3", "c3", "1", "65,536", "2.5e+09"],
        ["expert", "legal", "frequency", "", "c1", "c3", "2", "0", "2.5e+09"],
    ]
    rates = rates_table(results)
    assert rates.lines == [
        ["slm-0-tuned", "legal", "", "0.0005", "3.140"],
        ["slm-0-tuned", "legal", "yes; higher not tried", "0.0017", "3.102"],
        ["slm-0-tuned", "legal", "", "0.001", "not finite"],
    ]
    for table in (concentration, selection, rates):
        assert {len(line) for line in table.lines} == {len(table.header)}
