"""The command line."""

import sys
from typing import Annotated

import typer

from megatron_specialm import __version__
from megatron_specialm.base.errors import SpecialmError, machine_errors

# Each adds its commands, in the order in which --help lists them.
from megatron_specialm.cli import pages  # noqa: F401  # isort: split
from megatron_specialm.cli import jobs  # noqa: F401  # isort: split
from megatron_specialm.cli import results  # noqa: F401  # isort: split
from megatron_specialm.cli import machines  # noqa: F401  # isort: split
from megatron_specialm.cli.app import app


def main() -> None:
    """Run the command line. Errors of ours are printed in one line, without a traceback."""
    try:
        with machine_errors():
            app()
    except SpecialmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
