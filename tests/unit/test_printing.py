"""What users name, write and log is printed as text: it is neither taken for markup nor steers a terminal."""

import ast
import io
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from megatron_specialm.base import terminal
from megatron_specialm.base.printing import log_to_stderr, printable, say
from megatron_specialm.base.terminal import Table, console
from megatron_specialm.doctor.finding import Finding
from megatron_specialm.doctor.report import render as doctor_report
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.parity import compare as parity
from megatron_specialm.run.progress import TaskProgress
from tests.conftest import ROOT
from tests.run_folder import Run, make_run

MARKUP = "r[red]x[/red] [/] [link=file:/x]y :smile: \\[bold]"
# Without bells and carriage returns, which rich drops, and line ends.
STEERING = "a\x1b[31mb\x1b]0;title\x1b\\d\x9b2Je\x7ff\u202eg\u2066h\udcffi"
HARMLESS = r"a\x1b[31mb\x1b]0;title\x1b\d\x9b2Je\x7ff\u202eg\u2066h\udcffi"
HOSTILE = f"{MARKUP} {STEERING}"
SHOWN = f"{MARKUP} {HARMLESS}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (STEERING, HARMLESS),
        (MARKUP, MARKUP),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("Ångström 日本語 العربية 👩\u200d👩\u200d👧 e\u0301", "Ångström 日本語 العربية 👩\u200d👩\u200d👧 e\u0301"),
        ("\x00\x08\x0b\x0c\x1f\x80", r"\x00\x08\x0b\x0c\x1f\x80"),
        ("a bell\x07, a return\r, ends\u2028\u2029\x85", r"a bell\x07, a return\r, ends\u2028\u2029\x85"),
        (r"C:\new \x1b", r"C:\new \x1b"),
    ],
)
def test_what_steers_a_terminal_is_escaped_and_nothing_else(text: str, shown: str) -> None:
    assert printable(text) == shown == printable(shown)


def test_lines_and_logs_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    say(Path(HOSTILE))
    say(HOSTILE, error=True)
    assert capsys.readouterr() == (f"{SHOWN}\n", f"{SHOWN}\n")
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers.clear()
    try:
        log_to_stderr("%(levelname)s %(message)s")
        logging.getLogger("x").warning("%s", HOSTILE)
    finally:
        root.handlers[:] = before
    assert capsys.readouterr().err == f"WARNING {SHOWN}\n"


def _rich_table() -> RichTable:
    table = RichTable(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    return table


OUTCOME: dict[str, Any] = {
    "steps": 2,
    "differences": [
        {"quantity": HOSTILE, "tolerance": 1e-5, "passed": False, "failed": 1, "compared": 2,
         "worst": [{"where": HOSTILE, "difference": None}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("shown", "times"),
    [
        (HOSTILE, 1),
        (Text(HOSTILE), 1),
        (Group(HOSTILE, Text(HOSTILE)), 2),
        (Table(HOSTILE, [HOSTILE, "n"], [[HOSTILE, "1"]], 1, note=HOSTILE), 4),
        (_rich_table(), 5),
        (parity.table(HOSTILE, OUTCOME), 3),
        (doctor_report([Finding(HOSTILE, "missing", HOSTILE, HOSTILE, HOSTILE, needed=True)]), 6),
    ],
    ids=["text", "styled", "group", "table", "rich table", "parity", "doctor"],
)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_whatever_is_shown_is_text(shown: Any, times: int, is_terminal: bool) -> None:
    screen = terminal._Screen(file=io.StringIO(), width=10_000, force_terminal=is_terminal, color_system=None)
    screen.print(shown)
    found = " ".join(screen.file.getvalue().split())  # type: ignore[attr-defined]
    assert found.count(SHOWN) == times and not set(STEERING) & set(found) - set(SHOWN)


def test_news_of_a_run_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TaskProgress(2, console=console())
    for error in (None, f"{HOSTILE}\nand more"):
        progress.started(TaskId("tokens", HOSTILE))
        progress.finished(TaskId("tokens", HOSTILE), seconds=3, error=error)
    assert capsys.readouterr().out.splitlines() == [
        f"[  1/2] tokens/{SHOWN}: done in 3 s",
        f"[  1/2] tokens/{SHOWN}: failed after 3 s: {SHOWN}",
    ]


def test_a_jobs_error_and_log_are_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_specialm.slurm.status_view import status_view

    run: Run = make_run(tmp_path, monkeypatch)
    job = run.submit("7", "slm", keys=["generic"])
    run.attempt(job, 0, ("failed", HOSTILE))
    run.slurm_says("7|0|FAILED|0|UNLIMITED|n[red]1|None|\n")
    console().print(status_view(run.status()))
    said = capsys.readouterr().out
    assert SHOWN in said and not set(STEERING) & set(said) - set(SHOWN) - {"\n"}


@pytest.fixture
def odd_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of an odd name, with a root of another, and a log of a third kind in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("text")
    Path("r[red]x", "jobs").mkdir(parents=True)
    Path("r[red]x", "jobs", "tokens.generic.log").write_bytes(b"begin \x1b]0;title\x07 \xff [red]end\n")
    config = Path("p[red]\x1b[31m.yaml")
    config.write_text(
        "name: odd\nroot: 'r[red]x'\n"
        "text: {generic: {train: t.txt, test: t.txt}, domains: {law: {train: t.txt, test: t.txt}}}\n"
        "stages: {tokenizer: {kind: tokenizer}, tokens: {kind: tokenize, tokenizer: tokenizer}}\n"
    )
    return config


COMMANDS: dict[str, tuple[list[str], str]] = {
    "check": (["check"], r"p[red]\x1b[31m.yaml: OK"),
    "mistake": (["check", "nam=1"], r"p[red]\x1b[31m.yaml: nam"),
    "results": (["results"], "r[red]x: nothing has been evaluated"),
    "logs": (["logs", "tokens", "generic"], r"begin \x1b]0;title\x07 � [red]end"),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_commands_say_names_as_they_are(odd_config: Path, name: str, is_terminal: bool) -> None:
    (command, *more), wanted = COMMANDS[name]
    arguments = [sys.executable, "-m", "megatron_specialm", command, str(odd_config), *more]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not is_terminal:
        done = subprocess.run(arguments, capture_output=True, text=True, env=environ)
        said = done.stdout + done.stderr
        assert "\x1b" not in said
    else:
        parent, child = pty.openpty()
        process = subprocess.Popen(arguments, stdout=child, stderr=child, env=environ)
        os.close(child)
        said = ""
        while True:
            try:
                said += os.read(parent, 65_536).decode()
            except OSError:
                break
        process.wait()
        os.close(parent)
        assert "\x1b[31m.yaml" not in said and "\x1b]" not in said
    assert wanted in said


ELSEWHERE = {  # who may print otherwise, and why
    "base/printing.py": "it is the place",
    "doctor/process.py": "a module that is tried tells its parent through a pipe",
}
PRINTING = {"print", "echo", "secho", "basicConfig", "Console", "writelines"}


def test_nothing_is_printed_elsewhere() -> None:
    """In the package; `screen.print`, of a console, is a method of what `base/terminal.py` gives."""
    found = []
    for path in sorted((ROOT / "megatron_specialm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            plain = isinstance(node.func, ast.Name) and node.func.id in PRINTING
            module = isinstance(node.func, ast.Attribute) and node.func.attr in PRINTING - {"print"}
            stream = "sys.stdout.write" in ast.unparse(node.func) or "sys.stderr.write" in ast.unparse(node.func)
            if plain or module or stream:
                found.append(path.relative_to(ROOT / "megatron_specialm").as_posix())
    assert set(found) == ELSEWHERE.keys()
