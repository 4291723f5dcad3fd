"""What is printed: at 80 columns no number is cut or broken, and in a pipe or a log nothing is."""

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from rich.console import Console, RenderableType

from megatron_specialm.base.accelerator import planned_machine
from megatron_specialm.base.files import write_json
from megatron_specialm.base.process_status import PROGRESS, Count
from megatron_specialm.base.terminal import UNLIMITED, Table, console
from megatron_specialm.config.load import configs_folder, load_pipeline
from megatron_specialm.doctor.finding import Finding
from megatron_specialm.doctor.report import render as doctor_report
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.parity import compare as parity
from megatron_specialm.report.estimates import capabilities_table, memory_table, training_table
from megatron_specialm.report.tables import concentration_table, rates_table, results_in_two, selection_table
from megatron_specialm.run.progress import TaskProgress
from tests.unit.test_figures import invented, typed

ROOT = Path(__file__).parents[2]
LONG = "a-stage-whose-name-is-longer-than-half-of-a-terminal"
NUMBER = re.compile(r"\d[\d.,e+]*[A-Za-z*]?")


def _render(width: int, shown: Iterable[RenderableType]) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(*shown)
    return output.getvalue()


def long_config(folder: Path) -> Path:
    """A config with a stage of a long name, and its text."""
    for name in ("generic", "law"):
        (folder / f"{name}.txt").write_text("some words of text\n")
    sets = {"train": "generic.txt", "test": "law.txt"}
    config = {
        "name": "long", "root": "run", "text": {"generic": sets, "domains": {"law": sets}},
        "stages": {
            "tokenizer": {"kind": "tokenizer", "vocabulary_size": 300},
            "tokens": {"kind": "tokenize", "tokenizer": "tokenizer", "context_length": 32},
            **{
                f"{LONG}-{number}": {
                    "kind": "train", "data": "generic", "tokens": "tokens", "model": "nano", "steps": 10 ** (3 + number),
                    "global_batch_size": 8 * number,
                }
                for number in range(1, 6)
            },
            "perplexity": {"kind": "evaluate", "tokens": "tokens", "models": [f"{LONG}-1"]},
        },
    }  # fmt: skip
    path = folder / "long.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _results() -> list[Table]:
    results = invented(capped=("slm", "llm"))
    for part in ("rows", "macro"):
        for row in results[part]:
            row["method"] = f"{row['method']}-{LONG}"
    results = typed(results)
    return [*results_in_two(results), concentration_table(results), selection_table(results), rates_table(results)]


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_number_is_cut_or_broken(tmp_path: Path, width: int) -> None:
    configs = [load_pipeline(configs_folder() / "pipelines" / "paper.yaml"), load_pipeline(long_config(tmp_path))]
    machine = planned_machine("H100")
    tables = [*_results(), *(make(config, machine) for config in configs for make in (training_table, memory_table))]
    for table in tables:
        said = _render(width, [table])
        assert "…" not in said and max(map(len, said.splitlines())) <= width
        cells = {cell.strip() for line in table.lines for cell in line[table.words :]}
        numbers = set(filter(NUMBER.fullmatch, cells))
        assert numbers and numbers <= set(said.split())


def test_a_mark_behind_a_number_hangs_and_is_explained() -> None:
    table = Table("", ["what", "much"], [["a", "12.5*"], ["b", "7.5 "]], 1, "* as " + "it was said " * 8 + "long ago")
    _, _, _, first, second, *rest = _render(80, [table]).splitlines()
    assert first.index(".") == second.index(".") and first.rstrip().endswith("12.5*")
    assert " ".join(" ".join(rest).split()) == table.note and max(map(len, rest)) <= 80
    assert table.note in _render(UNLIMITED, [table]).splitlines()


def test_words_are_folded_not_cut() -> None:
    certificate = {
        "steps": 4, "passed": False,
        "differences": [
            {"quantity": "gradients", "largest": 1.0, "tolerance": 1e-5, "passed": False, "failed": 1, "compared": 27,
             "worst": [{"difference": 1.0, "where": "decoder.layers.11.self_attention.linear_qkv.layer_norm_weight"}]},
        ],
    }  # fmt: skip
    finding = Finding("torch", "broken", "2.11.0+cu130", f"/shared/{LONG}/{LONG}/{LONG}", f"pip install {LONG}{LONG}")
    for shown in (parity.table(LONG, certificate), doctor_report([finding]), capabilities_table()):
        said = _render(80, [shown])
        assert "…" not in said and max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_column_that_may_be_cut_keeps_each_line_a_line(width: int) -> None:
    lines = [["slm-tuned", "3 stale", "optimizer.learning_rate: 0.0001 -> 0.002; slm is redone; " * 3, "12 min"]] * 4
    table = Table("", ["stage", "tasks", "because", "spent"], lines, 3, cut="because")
    said = _render(width, [table]).splitlines()
    assert len(said) == 2 + 1 + len(lines) + 1 and max(map(len, said)) <= width
    assert sum("slm-tuned" in line and "3 stale" in line and "12 min" in line for line in said) == len(lines)
    whole = _render(UNLIMITED, [table])
    assert "…" not in whole and lines[0][2].strip() in whole


def test_bars_of_trainings_are_not_cut(tmp_path: Path) -> None:
    record = {
        "step": 12_000,
        "steps": 40_000,
        "loss": 3.412,
        "tokens_per_second": 182_000.0,
        "mfu": 0.41,
        "fill": 0.98,
        "eta_seconds": 3_725,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    output = io.StringIO()
    name = TaskId("a-stage-of-an-ordinary-name", "encyclopedia")
    with TaskProgress(1, console=Console(file=output, width=80, force_terminal=True, color_system=None)) as progress:
        progress.started(name)
        progress.update({name: tmp_path})
    said = output.getvalue()
    assert "…" not in said and {"3.412,", "182,000", "98%,", "41%,", "62:05"} <= set(said.split())


def test_a_failure_says_why_at_once() -> None:
    output, name = io.StringIO(), TaskId("tokens", "law")
    with TaskProgress(2, console=Console(file=output, width=200, color_system=None)) as progress:
        progress.started(name)
        progress.finished(name, seconds=1.2, error="text.domains.law: [4] documents are too few\n  log: run/jobs/x.log")
        assert "tokens/law: failed after 1 s: text.domains.law: [4] documents are too few" in output.getvalue()


def _specialm(folder: Path, *arguments: str, **variables: str) -> str:
    command = [sys.executable, "-m", "megatron_specialm", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    outcome = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_in_a_pipe_a_line_of_a_table_is_a_line(tmp_path: Path) -> None:
    long_config(tmp_path)
    narrow = {"COLUMNS": "80", "TERM": "dumb", "FORCE_COLOR": "1"}
    planned = _specialm(tmp_path, "plan", "long.yaml", "--tasks", **narrow)
    (line,) = (line for line in planned.splitlines() if f"perplexity/{LONG}-1.generic.law" in line)
    assert line.split() == [
        f"perplexity/{LONG}-1.generic.law", "to", "do", "law", f"{LONG}-1/generic,", "tokens/law",
    ]  # fmt: skip
    checked = _specialm(tmp_path, "check", "long.yaml", **narrow)
    assert "…" not in checked and sum(checked.count(f" {LONG}-{number} ") for number in range(1, 6)) >= 5
    assert "\x1b[2K" not in planned + checked and "\x1b[?25l" not in planned + checked  # nothing moves
    status = _specialm(tmp_path, "status", "long.yaml", **narrow)
    assert "…" not in status and all(f"{LONG}-{number}" in status for number in range(1, 6))


@pytest.mark.parametrize(
    "variables",
    [{"COLUMNS": "80"}, {}, {"TERM": "dumb"}, {"TERM": "dumb", "COLUMNS": "20", "FORCE_COLOR": "1"}, {"TTY_INTERACTIVE": "1"}],
)  # fmt: skip
def test_in_a_log_a_line_of_a_table_and_of_a_run_is_a_line(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "LINES", "TERM", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("megatron_specialm.run.progress.PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    domains = {f"{domain}-{LONG}-{number}": 1.0 for domain in ("law", "code") for number in range(20)}
    monkeypatch.setattr("tests.unit.test_figures.DOMAINS", domains)
    tables, name = _results(), TaskId(LONG, f"slm-is-tuned.{LONG}")
    write_json(tmp_path / PROGRESS, asdict(Count(12_000, 50_000, "windows", 812.3, 46.8)))
    screen = console()
    for table in tables:
        screen.print(table)
    with TaskProgress(1, console=screen) as progress:
        progress.started(name)
        progress.update({name: tmp_path})
        progress.finished(name, seconds=3, error=None)
    sys.stdout.flush()
    said = sys.stdout.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "…" not in said and "\x1b[2K" not in said and "\x1b[?25l" not in said
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in said.splitlines()]
    for table in tables:
        assert all(" ".join(line).split() in lines for line in table.lines)
    assert f"          {name}: 12,000 of 50,000 windows, 812 per second, 0:47 left" in said.splitlines()
    assert f"[  1/1] {name}: done in 3 s".split() in lines


@pytest.mark.parametrize("name", ["plan", "check", "status"])
def test_on_a_terminal_it_is_as_wide_as_that(name: str, tmp_path: Path) -> None:
    long_config(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "megatron_specialm", name, "long.yaml"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=side, env={**environment, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    )
    os.close(side)
    said = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other side has ended
            break
        said += part
    os.close(main)
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).splitlines()
    assert "…" not in said.decode() and 50 < max(map(len, lines)) <= 80
