"""The command line. Nothing here imports torch; the settings' schema is imported when a command runs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_specialm import __version__
from megatron_specialm.base.errors import ConfigError, MachineError, SpecialmError, machine_errors

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


def _print_capabilities(asked: bool) -> None:
    if asked:
        from rich.console import Console

        from megatron_specialm.launch.summary import capabilities_table

        Console().print(capabilities_table())
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
    from rich.console import Console

    from megatron_specialm.base.accelerator import find_accelerator
    from megatron_specialm.config.graph import build_graph
    from megatron_specialm.data.documents import resolve_files
    from megatron_specialm.launch.preflight import lacks, planned_machine
    from megatron_specialm.launch.summary import memory_table, training_table

    pipeline = _load(page, overrides)
    graph = build_graph(pipeline)
    for entry in dict.fromkeys(entry for task in graph.values() for entry in task.files):
        if not Path(entry).is_dir():
            resolve_files([entry])
    machine = planned_machine(gpu) if gpu else find_accelerator()
    Console().print(training_table(pipeline, machine))
    Console().print(memory_table(pipeline, machine))
    reasons = [reason for _, reason in lacks(pipeline, machine)]
    if gpu and reasons:
        raise MachineError(reasons[0])
    for reason in reasons:  # a login node has no GPU: the jobs may well have one
        typer.echo(f"warning: `run` would refuse on this machine: {reason}")
    typer.echo(f"{page}: OK, {len(pipeline.stages)} stages, {len(graph)} tasks")


@app.command()
def plan(page: Page, overrides: Overrides = None) -> None:
    """List the tasks of a page in order, and which of them are done, stale or still to do."""
    from rich.console import Console
    from rich.table import Table

    from megatron_specialm.launch.plan import make_plan

    pipeline = _load(page, overrides)
    table = Table("task", "state", "cost is", "reads")
    for name, planned in make_plan(pipeline, Path(pipeline.root)).items():
        reads = ", ".join(str(other) for other in planned.task.inputs)
        table.add_row(str(name), planned.state, planned.task.domain or "generic", reads)
    Console().print(table)


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
    jobs: Annotated[int | None, typer.Option(help="Tasks at a time; default: cores / threads.", min=1)] = None,
) -> None:
    """Do what a page's run folder still lacks, then print the table. Run again after any interruption."""
    from rich.console import Console

    from megatron_specialm.base.environment import discover_world
    from megatron_specialm.launch.inline import attended, fit_to_world, run_inline
    from megatron_specialm.launch.local import run_local
    from megatron_specialm.launch.plan import make_plan, select, write_resolved
    from megatron_specialm.launch.preflight import refuse_what_the_machine_lacks
    from megatron_specialm.launch.progress import Progress
    from megatron_specialm.launch.results import write_results
    from megatron_specialm.launch.tables import results_in_two

    world = discover_world()
    with attended(world) as lifeline:
        pipeline = _load(page, overrides)
        root = Path(pipeline.root)
        if world.launcher != "none":
            pipeline = fit_to_world(pipeline, world)
        chosen = select(make_plan(pipeline, root), only=only, until=until, keys=keys.split(",") if keys else None)
        to_do = {name.stage for name in chosen if chosen[name].state != "done"}
        refuse_what_the_machine_lacks(pipeline, stages=to_do, alone=world.launcher == "none")
        if world.is_first:
            write_resolved(pipeline, root)
        console = Console()
        if world.launcher != "none":
            run_inline(pipeline, chosen, root, world, lifeline)
        else:
            missing = sum(planned.state != "done" for planned in chosen.values())
            console.print(f"{pipeline.name}: {missing} of {len(chosen)} tasks to do, in {root}", highlight=False)
            with Progress(missing, console=console) as progress:
                run_local(pipeline, chosen, root, jobs=jobs, progress=progress)
        if world.is_first:
            outcome = write_results(pipeline, root)
            if outcome["rows"]:
                for table in results_in_two(outcome):
                    console.print(table.rich())
            console.print(f"results: {root / 'results.json'}", highlight=False)


@app.command()
def submit(
    page: Page,
    overrides: Overrides = None,
    site: Annotated[Path, typer.Option(help="The cluster's profile.")] = Path("slurm/site.yaml"),
    only: Annotated[str | None, typer.Option(help="Submit this stage alone.", show_default=False)] = None,
    until: Annotated[
        str | None, typer.Option(help="Submit this stage and all it rests on.", show_default=False)
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="With --only: of its tasks these alone, as c0,c3 or a domain's name.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts; write and submit nothing.")] = False,
) -> None:
    """Queue what a page's run folder still lacks, as Slurm jobs that wait for each other. Submit again at any time."""
    from megatron_specialm.base.lock import hold_folder
    from megatron_specialm.config.site import load_site
    from megatron_specialm.launch.plan import make_plan, select, write_resolved
    from megatron_specialm.slurm import submit as jobs
    from megatron_specialm.slurm.jobs import jobs_of
    from megatron_specialm.slurm.missing import live_tasks, missing_tasks

    pipeline, profile = _load(page, overrides), load_site(site)
    root = Path(pipeline.root)
    with hold_folder(root, wait_seconds=jobs.LOCK_SECONDS):
        plan = make_plan(pipeline, root)
        chosen = select(plan, only=only, until=until, keys=keys.split(",") if keys else None, check_inputs=False)
        known = jobs.recover(root)
        live = live_tasks(known)
        missing = missing_tasks(plan, chosen, live)
        submission = jobs.Submission.next(pipeline, profile, site.parent / profile.template, root, known)
        wanted = jobs_of(pipeline, profile, missing)
        if dry_run:
            for job, script in jobs.preview(submission, wanted, live=live):
                typer.echo(f"==> {job.name}: {len(job.elements)} elements\n{script}")
            return
        if wanted:
            write_resolved(pipeline, root)
        for job, record in zip(wanted, jobs.submit(submission, wanted, known=known, live=live), strict=True):
            after = f", after {', '.join(record.after)}" if record.after else ""
            typer.echo(f"{record.slurm_id}: {job.name}, {len(job.elements)} x {job.shape.describe()}{after}")
    done = sum(planned.state == "done" for planned in chosen.values())
    coming = len(chosen) - done - len(missing)
    typer.echo(f"{pipeline.name}: {len(missing)} tasks submitted, {coming} on their way, {done} done, in {root}")


@app.command(hidden=True)
def supervise(
    command: Annotated[list[str], typer.Argument(help="What each rank runs, behind --.", show_default=False)],
    ranks: Annotated[int, typer.Option(help="Processes in all.", envvar="SLURM_NTASKS")],
    ranks_per_node: Annotated[int, typer.Option(help="Processes that share a node.", envvar="SLURM_NTASKS_PER_NODE")],
    state: Annotated[Path, typer.Option(help="A folder for the state; of an array's element, with its number behind.")],
    site: Annotated[Path | None, typer.Option(help="The cluster's profile.", show_default=False)] = None,
    excluded: Annotated[Path | None, typer.Option(help="The folder that lists nodes to leave out.")] = None,
    launcher: Annotated[str | None, typer.Option(help="Instead of the profile's.", show_default=False)] = None,
) -> None:
    """Inside a job, on its first node: start the ranks, watch them, and queue the job again when they end early."""
    import logging

    from megatron_specialm.config.site import Site, load_site
    from megatron_specialm.slurm.allocation import read_allocation
    from megatron_specialm.slurm.sbatch import Shape
    from megatron_specialm.slurm.supervisor import Work
    from megatron_specialm.slurm.supervisor import supervise as run_attempt

    logging.basicConfig(level=logging.INFO, format="supervisor: %(asctime)s %(message)s")
    allocation = read_allocation()
    profile = load_site(site) if site else Site()
    element = "" if allocation.element is None else f".{allocation.element}"
    work = Work(
        profile, allocation, launcher or profile.launcher, Shape(ranks, ranks_per_node), command,  # type: ignore[arg-type]
        state.with_name(f"{state.name}{element}"), excluded or state.with_name("excluded"),
    )  # fmt: skip
    raise typer.Exit(run_attempt(work))


@app.command(hidden=True)
def work(
    job_file: Annotated[Path, typer.Argument(help="RUN/jobs/SUBMISSION/JOB.json.", show_default=False)],
    element: Annotated[
        int | None, typer.Option(help="Of its elements this one; default: the Slurm array task's.", min=0)
    ] = None,
) -> None:
    """Inside a job, in each rank: do what an element of a submitted job still lacks."""
    import logging

    from megatron_specialm.slurm.work import work as do_element

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    do_element(job_file, element=element)


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

    pipeline = _load(page, overrides)
    outcome = write_results(pipeline, Path(pipeline.root))
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
) -> None:
    """Draw a page's results into its run folder, over several seeds as mean and standard deviation; print the paths."""
    from megatron_specialm.launch.figures import draw
    from megatron_specialm.launch.results import write_results
    from megatron_specialm.launch.seeds import merge_runs

    pipeline = _load(page, overrides)
    root = Path(pipeline.root)
    outcome = write_results(pipeline, root)
    if runs:
        outcome = merge_runs([folder / "results.json" for folder in (root, *runs)])
    if not outcome["rows"]:
        typer.echo(f"{root}: nothing has been evaluated yet: `specialm run {page}` does that")
    for path in draw(outcome, root):
        typer.echo(path)


@app.command()
def status(
    page: Page,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again until no job is left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, one line per look.")] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds between two looks.", min=1)] = 10,
) -> None:
    """Say how far a page's jobs are, what they cost so far, and why some have failed."""
    from megatron_specialm.slurm.watch import show_status, watch_status

    pipeline = _load(page, overrides)
    if watch:
        watch_status(pipeline, as_json=as_json, seconds=every)
    else:
        show_status(pipeline, as_json=as_json)


@app.command()
def cancel(
    page: Page,
    stage: Annotated[str | None, typer.Argument(help="Of this stage alone.", show_default=False)] = None,
) -> None:
    """Cancel a page's jobs that are queued or running. Nothing that is done is lost; `submit` goes on from there."""
    from megatron_specialm.slurm.cancel import cancel as cancel_jobs_of

    pipeline = _load(page, None)
    if stage is not None and stage not in pipeline.stages:
        raise ConfigError(f"no stage {stage!r}; there are {', '.join(pipeline.stages)}")
    cancelled = cancel_jobs_of(Path(pipeline.root), stage)
    for job, alive in cancelled:
        typer.echo(f"cancelled {job.slurm_id}: {job.name}, {alive} of {len(job.elements)} elements")
    if not cancelled:
        typer.echo(f"{pipeline.root}: no job is queued or running")


@app.command()
def logs(
    page: Page,
    stage: Annotated[str, typer.Argument(help="A stage of the page.", show_default=False)],
    key: Annotated[str | None, typer.Argument(help="One task of it, as c3.", show_default=False)] = None,
    lines: Annotated[int, typer.Option(help="From the end.", min=1)] = 20,
    go_on: Annotated[bool, typer.Option("--follow", help="Go on with what is appended, until Ctrl-C.")] = False,
) -> None:
    """Print the end of a stage's newest log, wherever it was run, and the paths of the others."""
    from megatron_specialm.launch.logs import tail
    from megatron_specialm.slurm.logs import follow, newest_logs

    pipeline = _load(page, None)
    *others, newest = newest_logs(pipeline, stage, key)
    for path in others:
        typer.echo(path)
    typer.echo(f"==> {newest} <==")
    typer.echo("\n".join(tail(newest, lines)))
    if go_on:
        follow(newest)


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


@app.command()
def parity(
    page: Page,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="This train stage alone.", show_default=False)] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Instead of the page's.", show_default=False)] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(help="Instead of the page's.", show_default=False)] = None,
    virtual_pipeline: Annotated[int | None, typer.Option(help="Instead of the page's.", show_default=False)] = None,
    context_parallel: Annotated[int | None, typer.Option(help="Instead of the page's.", show_default=False)] = None,
    data_parallel: Annotated[int | None, typer.Option(help="Instead of the page's.", show_default=False)] = None,
    sequence_parallel: Annotated[bool | None, typer.Option(help="Instead of the page's.", show_default=False)] = None,
    distributed_optimizer: Annotated[
        bool | None, typer.Option(help="Instead of the page's.", show_default=False)
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Instead of the page's.", show_default=False)] = None,
) -> None:
    """Prove that a layout computes what one process computes: run both, small, and compare every parameter.

    Writes a certificate per train stage into the run folder; training copies it into its checkpoints.
    """
    from rich.console import Console

    from megatron_specialm.base.files import write_json
    from megatron_specialm.config.graph import build_graph
    from megatron_specialm.config.lineage import distinct_setups, setup_of
    from megatron_specialm.config.parity import parity_case
    from megatron_specialm.launch import parity as run
    from megatron_specialm.launch.preflight import refuse_what_the_machine_lacks

    changes = {
        "parallel.tensor_parallel": tensor_parallel, "parallel.pipeline_parallel": pipeline_parallel,
        "parallel.virtual_pipeline": virtual_pipeline, "parallel.context_parallel": context_parallel,
        "parallel.data_parallel": data_parallel, "parallel.sequence_parallel": sequence_parallel,
        "parallel.distributed_optimizer": distributed_optimizer, "precision": precision,
    }  # fmt: skip
    given = {field: value for field, value in changes.items() if value is not None}
    passed = True
    pipeline = _load(page, overrides)
    for name in distinct_setups(pipeline, stage):
        changed = [f"stages.{name}.{field}={value}" for field, value in given.items()]
        pipeline = _load(page, [*(overrides or []), *changed])
        build_graph(pipeline)  # the layout must be one that the model itself can take
        refuse_what_the_machine_lacks(pipeline, stages=[name])
        case = parity_case(setup_of(pipeline, name))
        outcome = run.certificate(case, run.compare(case))
        path = run.certificate_path(Path(pipeline.root), name)
        write_json(path, outcome)
        Console().print(run.table(name, outcome))
        typer.echo(
            f"{name}: {case.parallel.describe()} {'equals' if outcome['passed'] else 'DIFFERS FROM'} one process; {path}"
        )
        passed = passed and outcome["passed"]
    if not passed:
        raise typer.Exit(1)


@app.command()
def tune_precision(
    page: Page,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="This train stage alone.", show_default=False)] = None,
) -> None:
    """Time each linear of a page's models in bf16 and FP8 on this GPU, and say what to set."""
    from rich.console import Console

    from megatron_specialm.config.lineage import distinct_setups
    from megatron_specialm.launch.preflight import refuse_what_the_machine_lacks

    for name in distinct_setups(_load(page, overrides), stage):
        pipeline = _load(page, [*(overrides or []), f"stages.{name}.precision=fp8"])
        refuse_what_the_machine_lacks(pipeline, stages=[name])

        from megatron_specialm.train import tune_precision as tuning  # imports torch, which a refusal does not need

        timings = tuning.measure(distinct_setups(pipeline, name)[name])
        Console().print(tuning.timings_table(timings, title=name))
        typer.echo(f"stages.{name}: {tuning.advice(timings)}")


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Look only: no matrix products, no all-reduce.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine can do, and how to get what it lacks. Exits with 1 when nothing can be trained here."""
    from rich.console import Console

    from megatron_specialm.doctor.finding import can_train
    from megatron_specialm.doctor.report import as_json, examine, page

    with Console(stderr=True).status("Looking at this machine"):
        findings = examine(quick=quick)
    if json:
        typer.echo(as_json(findings))
    else:
        Console().print(page(findings))
    if not can_train(findings):
        raise typer.Exit(1)


def _load(page: Path, overrides: list[str] | None) -> "Pipeline":
    from megatron_specialm.config.load import load_pipeline

    return load_pipeline(page, overrides or ())
