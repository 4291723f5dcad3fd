"""What all commands share. Nothing here imports torch; the settings' schema is imported when a command runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megatron_specialm.config.schema import Pipeline

app = typer.Typer(
    help="Small specialized language models from one page of YAML.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Page = Annotated[Path, typer.Argument(help="A pipeline's YAML page.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Values of the page to replace: dotted.key=value.", show_default=False)
]


def load(page: Path, overrides: list[str] | None) -> "Pipeline":
    """The resolved page."""
    from megatron_specialm.config.load import load_pipeline

    return load_pipeline(page, overrides or ())
