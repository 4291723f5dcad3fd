"""The command line."""

import logging
import sys
from typing import Annotated

import typer

from megatron_specialm import __version__
from megatron_specialm.base.errors import SpecialmError, machine_errors
from megatron_specialm.base.output import lasting_output
from megatron_specialm.base.printing import PrintableFormatter, say
from megatron_specialm.cli.app import app

# Each adds its commands, in the order of --help.
# isort: off
from megatron_specialm.cli import pipelines, jobs, results, folders, convert, merging, machines  # noqa: F401
# isort: on

WORK = (["run"], ["work"], ["supervise"])  # commands that go on when their output cannot be written any more


def main() -> None:
    """Run the command line. Errors of this package are printed in one line, without a traceback."""
    if logging.lastResort:  # prints warnings of commands without a log
        logging.lastResort.setFormatter(PrintableFormatter())
    with lasting_output(may_be_lost=sys.argv[1:2] in WORK):
        try:
            with machine_errors():
                app()
        except SpecialmError as error:
            say(f"error: {error}", error=True)
            sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        say(__version__)
        raise typer.Exit
