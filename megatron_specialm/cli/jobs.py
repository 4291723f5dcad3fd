"""Commands for a config as Slurm jobs, and those that jobs themselves run."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.printing import log_to_stderr, say
from megatron_specialm.cli.app import Config, Overrides, Yes, agree, app, load


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    site: Annotated[
        Path | None,
        typer.Option(
            help="The cluster's profile; default: slurm/site.yaml, or the one that comes with the code.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Submit this stage alone.", show_default=False)] = None,
    until: Annotated[
        str | None, typer.Option(help="Submit this stage and all it rests on.", show_default=False)
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="With --only: of its tasks these alone, as c0,c3 or a domain's name.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts and submit nothing.")] = False,
    yes: Yes = False,
) -> None:
    """Queue what a config's run folder still lacks, as Slurm jobs that wait for each other. Submit again at any time."""
    from megatron_specialm.base.lock import hold_folder
    from megatron_specialm.config.site import find_profile, load_site, template_of, unknown_names
    from megatron_specialm.graph.plan import make_plan, refuse_foreign_folder, select, show, write_resolved
    from megatron_specialm.graph.redo import find_redo, redo_lines
    from megatron_specialm.run.preflight import refuse_too_little_held_out, refuse_what_gpus_lack
    from megatron_specialm.run.reuse import refuse_other_folders, reuse_summary, take_over
    from megatron_specialm.slurm import submit as jobs
    from megatron_specialm.slurm.jobs import jobs_of, missing_tasks
    from megatron_specialm.slurm.state import adopt_unattended, live_tasks, submitted_jobs
    from megatron_specialm.slurm.submission import Submission

    path = find_profile(site)
    pipeline, profile = load(config, overrides), load_site(path)
    for warning in unknown_names(profile, pipeline):
        say(f"warning: {path}: {warning}", error=True)
    refuse_other_folders(pipeline)
    root = Path(pipeline.root)
    refuse_foreign_folder(pipeline, root)
    # Who only looks need not be able to write.
    with contextlib.nullcontext() if dry_run else hold_folder(root, wait_seconds=jobs.LOCK_SECONDS):
        if not dry_run:
            adopt_unattended(root)
        plan = make_plan(pipeline, root)
        chosen = select(plan, only=only, until=until, keys=keys.split(",") if keys else None, check_inputs=False)
        known = submitted_jobs(root) if dry_run else jobs.recover(root)
        live = live_tasks(known)
        missing = missing_tasks(plan, chosen, live)
        elsewhere = {name: planned for name, planned in missing.items() if planned.there is not None}
        missing = {name: planned for name, planned in missing.items() if planned.there is None}
        submission = Submission.next(pipeline, profile, template_of(profile, path), root, known)
        stages = {name.stage for name in missing}
        refuse_what_gpus_lack(pipeline, profile.gpu, stages=stages)
        refuse_too_little_held_out(pipeline, plan, root, stages=stages)
        wanted = jobs_of(pipeline, profile, missing)
        redo = find_redo(pipeline, plan, root, missing)
        for line in redo_lines(redo):
            say(line)
        if dry_run:
            for job, script in jobs.preview(submission, wanted, live=live):
                say(f"==> {job.name}: {len(job.elements)} elements\n{script}")
            say(f"{pipeline.name}: {len(missing)} tasks to submit{reuse_summary(elsewhere)}, in {root}")
            return
        agree(redo, pipeline, yes=yes)
        if missing or elsewhere:
            write_resolved(pipeline, root)
        take_over(elsewhere, root)
        show(plan, root)
        for job, record in zip(wanted, jobs.submit(submission, wanted, known=known, live=live), strict=True):
            after = f", after {', '.join(record.after)}" if record.after else ""
            say(f"{record.slurm_id}: {job.name}, {len(job.elements)} x {job.shape.describe()}{after}")
    done = sum(planned.state == "done" for planned in chosen.values())
    coming = len(chosen) - done - len(missing) - len(elsewhere)
    counts = f"{len(missing)} tasks submitted, {coming} on their way, {done} done{reuse_summary(elsewhere)}"
    say(f"{pipeline.name}: {counts}, in {root}")


@app.command()
def status(
    config: Config,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again until no job is left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, one line per look.")] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds between two looks.", min=1)] = 10,
) -> None:
    """Say how far a config's jobs are, what they cost so far, and why some have failed."""
    from megatron_specialm.slurm.status_view import show_status, watch_status

    pipeline = load(config, overrides)
    if watch:
        watch_status(pipeline, as_json=as_json, seconds=every)
    else:
        show_status(pipeline, as_json=as_json)


@app.command()
def cancel(
    config: Config,
    words: Annotated[
        list[str] | None, typer.Argument(help="[STAGE], of this one alone; and overrides.", show_default=False)
    ] = None,
) -> None:
    """Cancel a config's jobs that are queued or running. Nothing that is done is lost; `submit` goes on from there."""
    from megatron_specialm.slurm.state import cancel as cancel_jobs_of

    (stage, *_), overrides = _names_and_overrides(words, most=1)
    pipeline = load(config, overrides)
    if stage is not None and stage not in pipeline.stages:
        raise ConfigError(f"no stage {stage!r}; there are {', '.join(pipeline.stages)}")
    cancelled = cancel_jobs_of(Path(pipeline.root), stage)
    for job, alive in cancelled:
        say(f"cancelled {job.slurm_id}: {job.name}, {alive} of {len(job.elements)} elements")
    if not cancelled:
        say(f"{pipeline.root}: no job is queued or running")


@app.command()
def logs(
    config: Config,
    words: Annotated[
        list[str], typer.Argument(help="STAGE [KEY], one task of it, as c3; and overrides.", show_default=False)
    ],
    lines: Annotated[int, typer.Option(help="From the end.", min=1)] = 20,
    go_on: Annotated[bool, typer.Option("--follow", help="Go on with what is appended, until Ctrl-C.")] = False,
) -> None:
    """Print the end of a stage's newest log, wherever it was run, and the paths of the others."""
    from megatron_specialm.run.logs import tail
    from megatron_specialm.slurm.logs import follow, newest_logs

    (stage, key), overrides = _names_and_overrides(words, most=2)
    if stage is None:
        raise ConfigError("logs: of which stage? specialm logs CONFIG STAGE [KEY] [OVERRIDES]")
    pipeline = load(config, overrides)
    *others, newest = newest_logs(pipeline, stage, key)
    for path in others:
        say(path)
    say(f"==> {newest} <==")
    say("\n".join(tail(newest, lines)))
    if go_on:
        follow(newest)


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

    log_to_stderr("supervisor: %(asctime)s %(message)s", level=logging.INFO)
    allocation = read_allocation()
    profile = load_site(site) if site else Site()
    if launcher is not None:
        profile = Site.model_validate({**profile.model_dump(exclude_unset=True), "launcher": launcher})
    element = "" if allocation.element is None else f".{allocation.element}"
    work = Work(
        profile, allocation, profile.launcher, Shape(ranks, ranks_per_node), command,
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

    log_to_stderr("%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    do_element(job_file, element=element)


def _names_and_overrides(words: list[str] | None, *, most: int) -> tuple[list[str | None], list[str]]:
    """At most so many names, None for those that are not given, and overrides of the config: those have a `=`."""
    names = [word for word in words or () if "=" not in word]
    if len(names) > most:
        raise ConfigError(f"{' '.join(names[most:])}: too many names: at most {most} may stand behind the config")
    return [*names, *[None] * (most - len(names))], [word for word in words or () if "=" in word]
