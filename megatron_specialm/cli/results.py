"""Commands for results and trained models."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_specialm.base.printing import say
from megatron_specialm.cli.app import Config, Overrides, app, load

if TYPE_CHECKING:
    from megatron_specialm.config.schema import Pipeline
    from megatron_specialm.graph.plan import PlannedTask
    from megatron_specialm.graph.tasks import TaskId
    from megatron_specialm.report.rows import Results

Runs = Annotated[
    list[Path] | None,
    typer.Option(help="The run folder of the same config at another seed; may be repeated.", show_default=False),
]


@app.command()
def results(
    config: Config,
    overrides: Overrides = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    runs: Runs = None,
    orders: Annotated[
        bool, typer.Option("--orders", help="Instead: which of the paper's orders of methods hold, on how many seeds.")
    ] = False,
) -> None:
    """Print the results of a config; of several seeds, means and standard deviations."""
    from megatron_specialm.base.terminal import console
    from megatron_specialm.report.orders import orders_table
    from megatron_specialm.report.results import capped_warnings
    from megatron_specialm.report.seeds import merge_seeds
    from megatron_specialm.report.tables import rates_table, results_in_two, results_table

    pipeline, plan, found = _collect(config, overrides, runs)
    merged = merge_seeds(found) if runs else found
    if found.rows and markdown:
        say((orders_table(found) if orders else results_table(merged)).markdown())
    elif found.rows:
        console().print(*([orders_table(found)] if orders else results_in_two(merged)))
        if found.learning_rates and not orders:
            console().print(rates_table(found))
        for warning in capped_warnings(pipeline, plan, Path(pipeline.root)):
            say(f"warning: {warning}")


@app.command()
def figures(
    config: Config,
    overrides: Overrides = None,
    runs: Runs = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The folder for `figures/`; default: the run folder.", show_default=False),
    ] = None,
) -> None:
    """Draw figures of a config's results, of several seeds with standard deviations, and print their paths."""
    from megatron_specialm.report.figures import draw
    from megatron_specialm.report.seeds import merge_seeds

    pipeline, _, found = _collect(config, overrides, runs)
    place = output or Path(pipeline.root)
    if output is None and not os.access(place, os.W_OK):
        say(f"warning: {place} cannot be written to: the figures go here (--output)", error=True)
        place = Path()
    for path in draw(merge_seeds(found) if runs else found, place):
        say(path)


def _collect(
    config: Path, overrides: list[str] | None, runs: list[Path] | None
) -> "tuple[Pipeline, Mapping[TaskId, PlannedTask], Results]":
    """The config, its plan, and the results of its run folder, followed by those of other runs. Prints what is left out."""
    from megatron_specialm.graph.plan import damage_in, make_plan
    from megatron_specialm.report.results import write_results
    from megatron_specialm.report.seeds import read_runs

    pipeline = load(config, overrides)
    root = Path(pipeline.root)
    plan = make_plan(pipeline, root)
    for damage in damage_in(plan, root):
        say(f"warning: {damage}: it is left out", error=True)
    found = write_results(pipeline, root, plan=plan, must_write=False)
    if runs:
        found = read_runs([folder / "results.json" for folder in (root, *runs)])
    if not found.rows:
        say(f"{root}: nothing has been evaluated yet: `specialm run {config}` does that")
    return pipeline, plan, found


@app.command()
def generate(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...",
            help="RUN/STAGE/KEY of a training, an exported folder, or a checkpoint of any format with a tokenizer.",
            show_default=False,
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="The beginning of the text.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="The most tokens to generate.", min=1)] = 60,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from so many of the likeliest tokens.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Generate text with models from a prompt."""
    from megatron_specialm.run.processes import ignore_expected_warnings

    ignore_expected_warnings()
    from megatron_specialm.stages.generation import open_model  # imports Megatron-Core

    for folder in models:
        text = open_model(folder).write(prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
        say(f"==> {folder} <==\n{text}" if len(models) > 1 else text)


@app.command()
def samples(
    config: Config,
    overrides: Overrides = None,
    tokens: Annotated[int, typer.Option(help="The most tokens to generate.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Generate text with each method's fine-tuned model, from the beginning of a held-out document of the first domain."""
    from megatron_specialm.run.processes import ignore_expected_warnings
    from megatron_specialm.run.samples import find_samples

    pipeline = load(config, overrides)
    if (found := find_samples(pipeline)) is None:
        domain = next(iter(pipeline.text.domains))
        say(f"{pipeline.root}: nothing has been fine-tuned on {domain} yet: `specialm run {config}` does that")
        return
    ignore_expected_warnings()
    from megatron_specialm.stages.generation import held_out_words, open_model  # imports Megatron-Core

    prompt = held_out_words(found.tokens, found.tokenizer)
    say(f"{found.domain}: how each method goes on from {prompt!r}")
    for method, folder in found.models.items():
        text = open_model(folder).write(prompt, tokens=tokens, temperature=0.8, top_k=40, seed=seed)
        say(f"{method}: {' '.join(text.split())}")
