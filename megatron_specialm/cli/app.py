"""What all commands share. Nothing here imports torch; the settings' schema is imported when a command runs."""

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
    help="Small specialized language models from one config of YAML.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Config = Annotated[Path, typer.Argument(help="A pipeline's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values of the config to replace: dotted.key=value.", show_default=False)
]

Yes = Annotated[bool, typer.Option("--yes", help="Make finished work anew without asking, whatever it costs.")]


def load(config: Path, overrides: list[str] | None) -> "Pipeline":
    """The resolved config."""
    from megatron_specialm.config.load import find_config, load_pipeline

    return load_pipeline(find_config(config), overrides or ())


def agree(redo: "Mapping[TaskId, Redo]", pipeline: "Pipeline", *, yes: bool, may_ask: bool = True) -> None:
    """Ask before finished work is made anew at more cost than `ask_above_device_hours`: on a terminal; elsewhere want `--yes`.

    Args:
        may_ask: False where a launcher has started several of this process, which share a terminal.

    Raises:
        UnconfirmedError: nobody could be asked, or the answer was no.
    """
    from megatron_specialm.graph.redo import needs_a_yes, refuse_unconfirmed

    if yes or not needs_a_yes(redo, pipeline):
        return
    on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
    if not (may_ask and on_terminal and typer.confirm("Make it anew?", err=True)):
        refuse_unconfirmed(redo, pipeline)
