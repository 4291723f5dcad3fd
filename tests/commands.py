"""The command line in this process. Workers of `run` and `parity` are forked from this process's server, which has imported
what they need: a process of its own would import for eight seconds."""

import _thread
import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from megatron_specialm.cli import main
from tests.conftest import ROOT
from tests.processes import rank_context

LIMIT_SECONDS = 500.0  # also within a fixture, which pytest-timeout does not watch


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def cli(folder: Path, *arguments: str, **environment: str) -> Done:
    """What `specialm ARGUMENTS` does in a folder. Errors that would print a traceback are raised. At the time limit it gets
    Ctrl-C, and fails."""
    if arguments[0] in ("run", "parity"):
        _start_server()
    output, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT), **environment}),
        mock.patch.object(sys, "argv", ["specialm", *arguments]),
        _without_log(),
        _limited(),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            assert end.code is None or isinstance(end.code, int)
            code = end.code or 0
    return Done(code, output.getvalue(), errors.getvalue())


def succeed(folder: Path, *arguments: str, **environment: str) -> str:
    """What a command that ends well prints."""
    done = cli(folder, *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _start_server() -> None:
    """Start the server from which workers are forked, unless it runs."""
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):
        rank_context()
        forkserver.ensure_running()


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Within, nothing collects log records, as where a process begins: pytest does."""
    root, last = logging.getLogger(), logging.lastResort
    assert last is not None
    before = root.handlers[:], root.level, last.formatter
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:], root.level, last.formatter = before


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    timer = threading.Timer(LIMIT_SECONDS, _thread.interrupt_main)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
