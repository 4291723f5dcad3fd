"""Commands that check, plan and run a page on this machine."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.printing import say
from megatron_specialm.cli.app import Overrides, Page, Yes, agree, app, load


def _print_capabilities(asked: bool) -> None:
    if asked:
        from megatron_specialm.base.terminal import console
        from megatron_specialm.launch.summary import capabilities_table

        console().print(capabilities_table())
        raise typer.Exit


@app.command()
def check(
    page: Page,
    overrides: Overrides = None,
    _capabilities: Annotated[
        bool,
        typer.Option(
            "--capabilities",
            is_eager=True,
            callback=_print_capabilities,
            help="Print what can be trained in which layout, and exit.",
        ),
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="Plan for GPUs of this name, not for this machine.", show_default=False)
    ] = None,
) -> None:
    """Find every mistake in a page before anything runs, and say what it would train."""
    from megatron_specialm.base.accelerator import find_accelerator
    from megatron_specialm.base.artifacts import ARTIFACTS
    from megatron_specialm.base.terminal import console
    from megatron_specialm.config.graph import build_graph
    from megatron_specialm.launch.hashes import look_up, naming_what_makes
    from megatron_specialm.launch.plan import make_plan
    from megatron_specialm.launch.preflight import (
        lacks,
        planned_machine,
        read_first_documents,
        refuse_too_few_documents,
    )
    from megatron_specialm.launch.redo import find_redo, redo_lines
    from megatron_specialm.launch.reuse import refuse_other_folders
    from megatron_specialm.launch.summary import memory_table, training_table

    pipeline = load(page, overrides)
    root = Path(pipeline.root)
    graph = build_graph(pipeline)
    refuse_other_folders(pipeline)
    with naming_what_makes(pipeline.text):
        look_up(graph.values(), Path(pipeline.root))
    read_first_documents(pipeline)
    refuse_too_few_documents(pipeline)
    machine = planned_machine(gpu) if gpu else find_accelerator()
    # Where nothing is finished, no text need be read.
    planned = make_plan(pipeline, root, keep_hashes=False) if (root / ARTIFACTS).is_dir() else {}
    console().print(training_table(pipeline, machine, planned), memory_table(pipeline, machine))
    reasons = [reason for _, reason in lacks(pipeline, machine)]
    if gpu and reasons:
        raise MachineError(reasons[0])
    for reason in reasons:  # a login node has no GPU: the jobs may well have one
        say(f"warning: `run` would refuse on this machine: {reason}")
    for line in redo_lines(find_redo(pipeline, planned, root)):
        say(line)
    say(f"{page}: OK, {len(pipeline.stages)} stages, {len(graph)} tasks")


@app.command()
def plan(
    page: Page,
    overrides: Overrides = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="A line per task, not per stage.")] = False,
) -> None:
    """Say how far each stage of a page is, what that has cost, and what is stale: why, and what making it anew costs."""
    from megatron_specialm.base.terminal import console
    from megatron_specialm.launch.plan import make_plan
    from megatron_specialm.launch.plan_table import stage_table, task_table
    from megatron_specialm.launch.redo import find_redo
    from megatron_specialm.launch.reuse import refuse_other_folders

    pipeline = load(page, overrides)
    refuse_other_folders(pipeline)
    root = Path(pipeline.root)
    planned = make_plan(pipeline, root)
    table = task_table if tasks else stage_table
    console().print(table(planned, find_redo(pipeline, planned, root), root))


@app.command()
def run(
    page: Page,
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.", show_default=False)] = None,
    until: Annotated[str | None, typer.Option(help="Run this stage and all it rests on.", show_default=False)] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="With --only: of its tasks these alone, as c0,c3 or a domain's name.", show_default=False),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Tasks at a time; default: GPUs, else cores / threads.", min=1)
    ] = None,
    yes: Yes = False,
) -> None:
    """Do what a page's run folder still lacks, then print the table. Run again after any interruption."""
    from megatron_specialm.base.environment import discover_world
    from megatron_specialm.base.lock import HANDOVER_SECONDS, hold_folder, in_job
    from megatron_specialm.base.terminal import console
    from megatron_specialm.launch.capped import capped_warnings
    from megatron_specialm.launch.earlier_layout import adopt_earlier_layout
    from megatron_specialm.launch.inline import attended, fit_to_world, run_inline
    from megatron_specialm.launch.local import run_local
    from megatron_specialm.launch.plan import make_plan, refuse_foreign_folder, select, write_resolved
    from megatron_specialm.launch.preflight import refuse_too_little_held_out, refuse_what_the_machine_lacks
    from megatron_specialm.launch.progress import Progress
    from megatron_specialm.launch.redo import find_redo, redo_lines
    from megatron_specialm.launch.results import write_results
    from megatron_specialm.launch.reuse import refuse_other_folders, told
    from megatron_specialm.launch.tables import rates_table, results_in_two
    from megatron_specialm.slurm.missing import refuse_live

    world = discover_world()
    with attended(world) as lifeline:
        pipeline = load(page, overrides)
        root = Path(pipeline.root)
        refuse_other_folders(pipeline)
        if world.is_first:
            refuse_foreign_folder(pipeline, root)
        # What is written to the folder, and looked up in it, is the holder's.
        holding = hold_folder(root, wait_seconds=HANDOVER_SECONDS, shared=in_job())
        with holding if world.is_first else contextlib.nullcontext() as held:
            if world.is_first:
                adopt_earlier_layout(root)
            tasks = make_plan(pipeline, root)
            chosen = select(tasks, only=only, until=until, keys=keys.split(",") if keys else None)
            to_do = {name.stage for name in chosen if chosen[name].is_to_do}
            if world.launcher != "none":
                pipeline = fit_to_world(
                    pipeline, world, stages={name.stage for name in chosen if chosen[name].state != "done"}
                )
            else:
                refuse_live(root, (name for name, planned in chosen.items() if planned.state != "done"))
            refuse_what_the_machine_lacks(pipeline, stages=to_do, alone=world.launcher == "none")
            refuse_too_little_held_out(pipeline, tasks, root, stages=to_do)
            redo = find_redo(pipeline, tasks, root, chosen)
            for line in redo_lines(redo) if world.is_first else ():
                say(line)
            agree(redo, pipeline, yes=yes, may_ask=world.launcher == "none")
            if world.is_first:
                write_resolved(pipeline, root)
            screen = console()
            if world.launcher != "none":
                run_inline(pipeline, chosen, root, world, lifeline)
            else:
                assert held is not None
                missing = sum(planned.is_to_do for planned in chosen.values())
                say(f"{pipeline.name}: {missing} of {len(chosen)} tasks to do{told(chosen)}, in {root}")
                with Progress(missing, console=screen) as progress:
                    run_local(pipeline, chosen, root, held=held, jobs=jobs, progress=progress)
            if world.is_first:
                outcome = write_results(pipeline, root)
                if outcome["rows"]:
                    screen.print(*results_in_two(outcome))
                if outcome["learning_rates"]:
                    screen.print(rates_table(outcome))
                for warning in capped_warnings(pipeline, chosen, root):
                    say(f"warning: {warning}")
                say(f"results: {root / 'results.json'}")
