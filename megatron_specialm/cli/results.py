"""Commands about what a config has made."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_specialm.base.printing import say
from megatron_specialm.cli.app import Config, Overrides, app, load

if TYPE_CHECKING:
    from megatron_specialm.graph.plan import PlannedTask
    from megatron_specialm.graph.tasks import TaskId

Runs = Annotated[
    list[Path] | None,
    typer.Option(help="The run folder of the same config at another seed; may be repeated.", show_default=False),
]


@app.command()
def results(
    config: Config,
    overrides: Overrides = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it as Markdown.")] = False,
    runs: Runs = None,
    orders: Annotated[
        bool, typer.Option("--orders", help="Instead: which of the paper's orders of methods hold, on how many seeds.")
    ] = False,
) -> None:
    """Print the table of a config's run folder again; of several seeds, means and standard deviations."""
    from megatron_specialm.base.terminal import console
    from megatron_specialm.graph.plan import make_plan
    from megatron_specialm.report.capped import capped_warnings
    from megatron_specialm.report.orders import orders_table
    from megatron_specialm.report.results import write_results
    from megatron_specialm.report.seeds import merge_seeds, read_runs
    from megatron_specialm.report.tables import rates_table, results_in_two, results_table

    pipeline = load(config, overrides)
    root = Path(pipeline.root)
    plan = make_plan(pipeline, root)
    _warn_of_damage(plan, root)
    outcome = write_results(pipeline, root, plan=plan, must_write=False)
    if runs:
        outcome = read_runs([folder / "results.json" for folder in (root, *runs)])
    merged = merge_seeds(outcome) if runs else outcome
    if not outcome["rows"]:
        _nothing_evaluated(pipeline.root, config)
    elif markdown:
        say((orders_table(outcome) if orders else results_table(merged)).markdown())
    else:
        console().print(*([orders_table(outcome)] if orders else results_in_two(merged)))
        if outcome["learning_rates"] and not orders:
            console().print(rates_table(outcome))
        for warning in capped_warnings(pipeline, plan, root):
            say(f"warning: {warning}")


@app.command()
def figures(
    config: Config,
    overrides: Overrides = None,
    runs: Runs = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where `figures/` is made; default: the run folder.", show_default=False),
    ] = None,
) -> None:
    """Draw a config's results into its run folder, over several seeds as mean and standard deviation; print the paths."""
    from megatron_specialm.graph.plan import make_plan
    from megatron_specialm.report.figures import draw
    from megatron_specialm.report.results import write_results
    from megatron_specialm.report.seeds import merge_runs

    pipeline = load(config, overrides)
    root = Path(pipeline.root)
    plan = make_plan(pipeline, root)
    _warn_of_damage(plan, root)
    outcome = write_results(pipeline, root, plan=plan, must_write=False)
    if runs:
        outcome = merge_runs([folder / "results.json" for folder in (root, *runs)])
    if not outcome["rows"]:
        _nothing_evaluated(pipeline.root, config)
    place = output or root
    if output is None and not os.access(root, os.W_OK):
        place = Path()
        say(f"warning: {root} cannot be written to: the figures go here (--output)", error=True)
    for path in draw(outcome, place):
        say(path)


def _warn_of_damage(plan: "Mapping[TaskId, PlannedTask]", root: Path) -> None:
    """What is damaged counts for nothing in the tables."""
    from megatron_specialm.graph.plan import damage_in

    for damage in damage_in(plan, root):
        say(f"warning: {damage}: it is left out", error=True)


def _nothing_evaluated(root: str, config: Path) -> None:
    say(f"{root}: nothing has been evaluated yet: `specialm run {config}` does that")


@app.command()
def generate(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...", help="RUN/STAGE/KEY of a training, or an exported folder.", show_default=False
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="How the text begins.", show_default=False)],
    tokens: Annotated[int, typer.Option(help="To write, at most.", min=1)] = 60,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among so many of the likeliest tokens.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Equal seeds, equal text.")] = 0,
) -> None:
    """Let models go on with a text, for a look at what they have learned."""
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
    tokens: Annotated[int, typer.Option(help="To write, at most.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Equal seeds, equal text.")] = 0,
) -> None:
    """Let the fine-tuned model of each method go on with the beginning of a held-out document of the first domain."""
    from megatron_specialm.base.artifacts import artifact_folder, read_marker
    from megatron_specialm.config.text import GENERIC
    from megatron_specialm.graph.lineage import finetuned_models, tokenize_stage, train_stage
    from megatron_specialm.graph.plan import make_plan
    from megatron_specialm.graph.tasks import TaskId
    from megatron_specialm.run.processes import ignore_expected_warnings

    pipeline = load(config, overrides)
    root, domain = Path(pipeline.root), next(iter(pipeline.text.domains))
    plan = make_plan(pipeline, root, keep_hashes=False)
    folders = {name: artifact_folder(root, *name, planned.digest) for name, planned in plan.items()}
    models = {
        method: stage
        for method, stage in finetuned_models(pipeline).items()
        if read_marker(folders[TaskId(stage, domain)]) is not None
    }
    if not models:
        say(f"{root}: nothing has been fine-tuned on {domain} yet: `specialm run {config}` does that")
        return
    ignore_expected_warnings()
    from megatron_specialm.stages.generation import held_out_words, open_model  # imports Megatron-Core

    store = train_stage(pipeline, next(iter(models.values()))).tokens
    tokenizer = folders[TaskId(tokenize_stage(pipeline, store).tokenizer, GENERIC)]
    prompt = held_out_words(folders[TaskId(store, domain)], tokenizer)
    say(f"{domain}: how each method goes on from {prompt!r}")
    for method, stage in models.items():
        writer = open_model(folders[TaskId(stage, domain)])
        text = writer.write(prompt, tokens=tokens, temperature=0.8, top_k=40, seed=seed)
        say(f"{method}: {' '.join(text.split())}")


@app.command()
def project(
    folder: Annotated[Path, typer.Argument(help="A trained projected network: RUN/STAGE/generic.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A folder to make.", show_default=False)],
    expert: Annotated[int, typer.Option(help="Which expert, from 0: the number of its cluster.", show_default=False)],
) -> None:
    """Write one expert of a projected network as an ordinary checkpoint. Needs nothing but the network's."""
    from megatron_specialm.run.processes import ignore_expected_warnings

    ignore_expected_warnings()
    from megatron_specialm.checkpoint.merged import project_expert  # imports Megatron-Core

    step = project_expert(folder, output, expert=expert)
    say(f"expert {expert}: {step}")
