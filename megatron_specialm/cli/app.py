"""Options and functions of several commands. No torch; the config's schema is imported when a command runs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_specialm.config.schema import Pipeline
    from megatron_specialm.graph.redo import Redo
    from megatron_specialm.graph.tasks import TaskId

app = typer.Typer(
    help="Train small specialized language models from one YAML config.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Config = Annotated[Path, typer.Argument(help="A pipeline's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Config values to replace: dotted.key=value.", show_default=False)
]

Only = Annotated[str | None, typer.Option(help="Only this stage.", show_default=False)]
Until = Annotated[str | None, typer.Option(help="This stage and all stages that it depends on.", show_default=False)]
Keys = Annotated[
    str | None,
    typer.Option(help="With --only: only these tasks of the stage, as c0,c3 or a domain's name.", show_default=False),
]
Yes = Annotated[bool, typer.Option("--yes", help="Repeat finished work without asking, at any cost.")]


def load(config: Path, overrides: list[str] | None) -> "Pipeline":
    from megatron_specialm.config.load import find_config, load_pipeline

    return load_pipeline(find_config(config), overrides or ())


def split_keys(keys: str | None) -> list[str] | None:
    """The value of `--keys` as a list."""
    return keys.split(",") if keys else None


def agree(redo: "Mapping[TaskId, Redo]", pipeline: "Pipeline", *, yes: bool, may_ask: bool = True) -> None:
    """Ask before finished work is repeated at a cost above `ask_above_device_hours`: on a terminal by a question, otherwise by
    an error without `--yes`.

    Args:
        may_ask: False for ranks of a launcher, which share a terminal.

    Raises:
        UnconfirmedError: there is no terminal, or the answer was no.
    """
    from megatron_specialm.graph.redo import needs_confirmation, refuse_unconfirmed

    if yes or not needs_confirmation(redo, pipeline):
        return
    on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
    if not (may_ask and on_terminal and typer.confirm("Redo this work?", err=True)):
        refuse_unconfirmed(redo, pipeline)
