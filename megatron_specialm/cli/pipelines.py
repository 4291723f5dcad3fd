"""Commands that check, plan and run a config on this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_specialm.base.errors import ConfigError, MachineError
from megatron_specialm.base.printing import say
from megatron_specialm.cli.app import Config, Keys, Only, Overrides, Until, Yes, agree, app, load, split_keys

if TYPE_CHECKING:
    from megatron_specialm.config.schema import Pipeline
    from megatron_specialm.graph.plan import PlannedTask
    from megatron_specialm.graph.tasks import TaskId


def _print_capabilities(asked: bool) -> None:
    if asked:
        from megatron_specialm.base.terminal import console
        from megatron_specialm.report.estimates import capabilities_table

        console().print(capabilities_table())
        raise typer.Exit


@app.command()
def check(
    config: Config,
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
        str | None, typer.Option(help="Check for GPUs of this name, not for this machine.", show_default=False)
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="With --gpu: propose layouts of so many nodes.", min=1, show_default=False)
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="With --nodes: of this train stage only.", show_default=False)
    ] = None,
) -> None:
    """Find the mistakes of a config before anything runs, and show what it would train."""
    from megatron_specialm.base.terminal import console
    from megatron_specialm.graph.redo import find_redo, redo_lines
    from megatron_specialm.report.coverage import coverage_warnings
    from megatron_specialm.report.estimates import memory_table, training_table
    from megatron_specialm.report.layouts import layout_tables
    from megatron_specialm.run.preflight import check as check_config

    if nodes and not gpu:
        raise ConfigError("--nodes: layouts are proposed for GPUs of a known model: add --gpu, as --gpu H100")
    if stage and not nodes:
        raise ConfigError("--stage: chooses the train stage whose layouts are proposed: add --gpu and --nodes")
    pipeline = load(config, overrides)
    checked = check_config(pipeline, gpu=gpu)
    console().print(training_table(pipeline, checked.machine, checked.plan), memory_table(pipeline, checked.machine))
    if nodes:
        console().print(*layout_tables(pipeline, checked.machine, nodes, stage), sep="\n")
    elif gpu and checked.lacking:
        raise MachineError(checked.lacking[0])
    for reason in checked.lacking:  # a login node has no GPU: the jobs may well have one
        say(f"warning: `run` would refuse on {gpu or 'this machine'}: {reason}")
    for line in redo_lines(find_redo(pipeline, checked.plan, Path(pipeline.root))):
        say(line)
    for warning in coverage_warnings(pipeline, checked.plan, Path(pipeline.root)):
        say(f"warning: {warning}")
    say(f"{config}: OK, {len(pipeline.stages)} stages, {checked.tasks} tasks")


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="A line per task, not per stage.")] = False,
) -> None:
    """Show the state and cost of a config's stages; of stale ones the reason, and the cost of repeating them."""
    from megatron_specialm.base.terminal import console
    from megatron_specialm.graph.plan import make_plan
    from megatron_specialm.graph.redo import find_redo
    from megatron_specialm.report.plan_table import stage_table, task_table
    from megatron_specialm.run.reuse import refuse_other_folders

    pipeline = load(config, overrides)
    refuse_other_folders(pipeline)
    root = Path(pipeline.root)
    planned = make_plan(pipeline, root)
    table = task_table if tasks else stage_table
    console().print(table(planned, find_redo(pipeline, planned, root), root))


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    only: Only = None,
    until: Until = None,
    keys: Keys = None,
    jobs: Annotated[
        int | None, typer.Option(help="Tasks at a time; default: GPUs, else cores / threads.", min=1)
    ] = None,
    yes: Yes = False,
) -> None:
    """Run a config's missing tasks, then print the results. After an interruption, run it again."""
    from megatron_specialm.base.environment import discover_world
    from megatron_specialm.base.lock import HANDOVER_SECONDS, hold_folder, in_job
    from megatron_specialm.base.terminal import console
    from megatron_specialm.graph.plan import refuse_foreign_folder, write_resolved
    from megatron_specialm.graph.redo import redo_lines
    from megatron_specialm.run.inline import follow, join_ranks, lead, rank_lifecycle, run_inline
    from megatron_specialm.run.local import run_local
    from megatron_specialm.run.prepare import prepare
    from megatron_specialm.run.progress import TaskProgress
    from megatron_specialm.run.reuse import refuse_other_folders, reuse_summary
    from megatron_specialm.slurm.state import adopt_unattended, refuse_live

    world = discover_world()
    alone = world.launcher == "none"
    with rank_lifecycle(world) as process_status:
        pipeline = load(config, overrides)
        root = Path(pipeline.root)
        refuse_other_folders(pipeline)
        if not world.is_first:
            run_inline(*follow(pipeline, root, world, process_status), root, world, process_status)
            return
        refuse_foreign_folder(pipeline, root)
        # What is written to the folder, and looked up in it, is the holder's.
        with hold_folder(root, wait_seconds=HANDOVER_SECONDS, shared=in_job()) as held:
            if not alone:
                join_ranks(pipeline, world, process_status)
            adopt_unattended(root)
            ready = prepare(pipeline, root, world, only=only, until=until, keys=split_keys(keys))
            if alone:
                refuse_live(root, ready.chosen)
            for line in redo_lines(ready.redo):
                say(line)
            agree(ready.redo, pipeline, yes=yes, may_ask=alone)
            write_resolved(ready.pipeline, root)
            if alone:
                said = f"{ready.missing} of {len(ready.chosen)} tasks to do{reuse_summary(ready.chosen)}"
                say(f"{pipeline.name}: {said}, in {root}")
                with TaskProgress(ready.missing, console=console()) as progress:
                    run_local(ready.pipeline, ready.chosen, root, held=held, jobs=jobs, progress=progress)
            else:
                lead(ready.chosen, world)
                run_inline(ready.pipeline, ready.chosen, root, world, process_status)
            _show_results(ready.pipeline, ready.chosen, root)


def _show_results(pipeline: "Pipeline", chosen: "Mapping[TaskId, PlannedTask]", root: Path) -> None:
    from megatron_specialm.base.terminal import console
    from megatron_specialm.report.results import capped_warnings, write_results
    from megatron_specialm.report.tables import rates_table, results_in_two

    outcome = write_results(pipeline, root)
    if outcome.rows:
        console().print(*results_in_two(outcome))
    if outcome.learning_rates:
        console().print(rates_table(outcome))
    for warning in capped_warnings(pipeline, chosen, root):
        say(f"warning: {warning}")
    say(f"results: {root / 'results.json'}")
