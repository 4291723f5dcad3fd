"""Commands about what a page has made."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_specialm.cli.app import Overrides, Page, app, load


@app.command()
def results(
    page: Page,
    overrides: Overrides = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it as Markdown.")] = False,
) -> None:
    """Print the table of a page's run folder again."""
    from rich.console import Console

    from megatron_specialm.launch.results import write_results
    from megatron_specialm.launch.tables import results_in_two, results_table

    pipeline = load(page, overrides)
    outcome = write_results(pipeline, Path(pipeline.root), must_write=False)
    if markdown:
        typer.echo(results_table(outcome).markdown())
    else:
        Console().print(*(table.rich() for table in results_in_two(outcome)))


@app.command()
def figures(
    page: Page,
    overrides: Overrides = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="The run folder of the same page at another seed; may be repeated.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where `figures/` is made; default: the run folder.", show_default=False),
    ] = None,
) -> None:
    """Draw a page's results into its run folder, over several seeds as mean and standard deviation; print the paths."""
    from megatron_specialm.launch.figures import draw
    from megatron_specialm.launch.results import write_results
    from megatron_specialm.launch.seeds import merge_runs

    pipeline = load(page, overrides)
    root = Path(pipeline.root)
    outcome = write_results(pipeline, root, must_write=False)
    if runs:
        outcome = merge_runs([folder / "results.json" for folder in (root, *runs)])
    if not outcome["rows"]:
        typer.echo(f"{root}: nothing has been evaluated yet: `specialm run {page}` does that")
    place = output or root
    if output is None and not os.access(root, os.W_OK):
        place = Path()
        typer.echo(f"warning: {root} cannot be written to: the figures go here (--output)", err=True)
    for path in draw(outcome, place):
        typer.echo(path)


@app.command()
def project(
    folder: Annotated[Path, typer.Argument(help="A trained projected network: RUN/STAGE/generic.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A folder to make.", show_default=False)],
    expert: Annotated[int, typer.Option(help="Which expert, from 0: the number of its cluster.", show_default=False)],
) -> None:
    """Write one expert of a projected network as an ordinary checkpoint. Needs nothing but the network's."""
    from megatron_specialm.launch.worker import ignore_expected_warnings

    ignore_expected_warnings()
    from megatron_specialm.train.served import project_expert  # imports Megatron-Core

    step = project_expert(folder, output, expert=expert)
    typer.echo(f"expert {expert}: {step}")
