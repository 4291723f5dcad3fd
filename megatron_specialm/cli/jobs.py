"""Commands for Slurm jobs, and the commands that jobs run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.printing import log_to_stderr, say
from megatron_specialm.cli.app import Config, Keys, Only, Overrides, Until, Yes, agree, app, load, split_keys

if TYPE_CHECKING:
    from megatron_specialm.graph.redo import Redo
    from megatron_specialm.graph.tasks import TaskId


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    site: Annotated[
        Path | None,
        typer.Option(
            help="The cluster's profile; default: slurm/site.yaml, or the one in the package.",
            show_default=False,
        ),
    ] = None,
    only: Only = None,
    until: Until = None,
    keys: Keys = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts and submit nothing.")] = False,
    yes: Yes = False,
) -> None:
    """Queue a config's missing tasks as Slurm jobs with dependencies. It is safe to submit again at any time."""
    from megatron_specialm.config.site import find_profile, load_site, unknown_names
    from megatron_specialm.graph.redo import redo_lines
    from megatron_specialm.slurm.submit_missing import submit_missing

    def confirm(redo: "Mapping[TaskId, Redo]") -> None:
        for line in redo_lines(redo):
            say(line)
        if not dry_run:
            agree(redo, pipeline, yes=yes)

    path = find_profile(site)
    pipeline, profile = load(config, overrides), load_site(path)
    for warning in unknown_names(profile, pipeline):
        say(f"warning: {path}: {warning}", error=True)
    outcome = submit_missing(
        pipeline, profile, path, only=only, until=until, keys=split_keys(keys), dry_run=dry_run, confirm=confirm
    )
    for job, script in outcome.scripts:
        say(f"==> {job.name}: {len(job.elements)} elements\n{script}")
    for job, record in outcome.queued:
        after = f", after {', '.join(record.after)}" if record.after else ""
        say(f"{record.slurm_id}: {job.name}, {len(job.elements)} x {job.size.describe()}{after}")
    say(f"{pipeline.name}: {outcome.counts}, in {pipeline.root}")


@app.command()
def status(
    config: Config,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat until no job is queued or running.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line per update.")] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds between updates.", min=1)] = 10,
) -> None:
    """Show the progress and cost of a config's jobs, and why some failed."""
    from megatron_specialm.slurm.status import read_status
    from megatron_specialm.slurm.status_view import show_status, watch_status

    pipeline = load(config, overrides)
    if watch:
        watch_status(pipeline, as_json=as_json, seconds=every)
    else:
        show_status(read_status(pipeline), as_json=as_json)


@app.command()
def cancel(
    config: Config,
    words: Annotated[
        list[str] | None, typer.Argument(help="[STAGE], to cancel only its jobs; and overrides.", show_default=False)
    ] = None,
) -> None:
    """Cancel a config's queued and running jobs. Finished work is kept; `submit` continues from there."""
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
        list[str], typer.Argument(help="STAGE [KEY], such as slm-mix c3; and overrides.", show_default=False)
    ],
    lines: Annotated[int, typer.Option(help="Number of lines from the end.", min=1)] = 20,
    go_on: Annotated[bool, typer.Option("--follow", help="Print appended lines until Ctrl-C.")] = False,
) -> None:
    """Print the end of a stage's newest log, of a local run or a job, and the paths of older logs."""
    from megatron_specialm.run.processes import tail
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
    command: Annotated[list[str], typer.Argument(help="The command of each rank, after --.", show_default=False)],
    ranks: Annotated[int, typer.Option(help="Processes in all.", envvar="SLURM_NTASKS")],
    ranks_per_node: Annotated[int, typer.Option(help="Processes that share a node.", envvar="SLURM_NTASKS_PER_NODE")],
    state: Annotated[Path, typer.Option(help="A folder for the state; the number of an array's element is appended.")],
    site: Annotated[Path | None, typer.Option(help="The cluster's profile.", show_default=False)] = None,
    excluded: Annotated[Path | None, typer.Option(help="The folder that lists nodes to leave out.")] = None,
    launcher: Annotated[str | None, typer.Option(help="Instead of the profile's.", show_default=False)] = None,
) -> None:
    """In a job, on its first node: start the ranks, monitor them, and requeue the job when they end early."""
    import logging

    from megatron_specialm.config.site import Site, load_site
    from megatron_specialm.slurm.allocation import read_allocation
    from megatron_specialm.slurm.sbatch import JobSize
    from megatron_specialm.slurm.supervisor import JobAttempt
    from megatron_specialm.slurm.supervisor import supervise as run_attempt

    log_to_stderr("supervisor: %(asctime)s %(message)s", level=logging.INFO)
    allocation = read_allocation()
    profile = load_site(site) if site else Site()
    if launcher is not None:
        profile = Site.model_validate({**profile.model_dump(exclude_unset=True), "launcher": launcher})
    element = "" if allocation.element is None else f".{allocation.element}"
    attempt = JobAttempt(
        profile, allocation, profile.launcher, JobSize(ranks, ranks_per_node), command,
        state.with_name(f"{state.name}{element}"), excluded or state.with_name("excluded"),
    )  # fmt: skip
    raise typer.Exit(run_attempt(attempt))


@app.command(hidden=True)
def work(
    job_file: Annotated[Path, typer.Argument(help="RUN/jobs/SUBMISSION/JOB.json.", show_default=False)],
    element: Annotated[
        int | None, typer.Option(help="The element; default: that of the Slurm array task.", min=0)
    ] = None,
) -> None:
    """In a job, in each rank: do the unfinished tasks of a job's element."""
    import logging

    from megatron_specialm.slurm.work import work as do_element

    log_to_stderr("%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    do_element(job_file, element=element)


def _names_and_overrides(words: list[str] | None, *, most: int) -> tuple[list[str | None], list[str]]:
    """Split arguments into at most so many names (None for those not given) and overrides, which contain a `=`."""
    names = [word for word in words or () if "=" not in word]
    if len(names) > most:
        raise ConfigError(f"{' '.join(names[most:])}: too many names: at most {most} may stand behind the config")
    return [*names, *[None] * (most - len(names))], [word for word in words or () if "=" in word]
