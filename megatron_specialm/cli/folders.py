"""Commands that check and clean run folders."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.printing import say
from megatron_specialm.base.stopwatch import Stopwatch
from megatron_specialm.cli.app import Config, Overrides, app, load


@app.command()
def verify(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders: the `root` of a config.", show_default=False)
    ],
    deep: Annotated[bool, typer.Option("--deep", help="Compare hashes of all files, not only sizes.")] = False,
) -> None:
    """Verify the artifacts of run folders. The exit code is 1 if something is damaged."""
    from megatron_specialm.run.verify import verify as verify_folder

    damaged = 0
    for root in folders:
        watch = Stopwatch()
        finding = verify_folder(root, deep=deep)
        for damage in finding.damage:
            say(f"damaged: {damage}")
        for path in finding.unfinished:
            say(f"unfinished: {path}: not there (yet): `specialm run` goes on with the task")
        for path in finding.unlisted:
            say(f"unlisted: {path}: no task has made it, and nothing reads it")
        say(
            f"{root}: {finding.artifacts} artifacts ({len(finding.unfinished)} unfinished), {finding.files} files of "
            f"{finding.bytes / 2**20:,.1f} MiB in {watch.seconds:.1f} s: {len(finding.damage)} damaged"
        )
        damaged += len(finding.damage)
    if damaged:
        say(
            f"{damaged} damaged: put them back from a copy; or remove an artifact's done.json, and `specialm run` makes it "
            "again",
            error=True,
        )
        raise typer.Exit(1)


@app.command()
def clean(
    config: Config,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them.")] = False,
) -> None:
    """List artifacts of other settings in a config's run folder, with size, age and cost; --yes removes them."""
    import shutil

    from megatron_specialm.base.lock import hold_folder
    from megatron_specialm.base.terminal import console
    from megatron_specialm.graph.plan import make_plan, refuse_foreign_folder
    from megatron_specialm.run.clean import find_unwanted, remove, unwanted_table
    from megatron_specialm.slurm import records
    from megatron_specialm.slurm.state import used_by_jobs

    pipeline = load(config, overrides)
    root = Path(pipeline.root)
    if not root.is_dir():
        say(f"{root}: there is no run folder yet")
        return
    refuse_foreign_folder(pipeline, root)
    with hold_folder(root):
        jobs = records.read_registry(root)
        can_ask = shutil.which("squeue") is not None
        if yes and jobs and not can_ask:
            raise MachineError(
                f"{root}: jobs were submitted from here, and this machine has no squeue to ask which of them live: "
                "clean on a login node of the cluster"
            )
        unwanted = find_unwanted(make_plan(pipeline, root), root, live=used_by_jobs(root, jobs) if can_ask else ())
        total = f"{len(unwanted)} artifacts, {sum(one.bytes for one in unwanted) / 2**20:,.1f} MiB"
        if unwanted:
            console().print(unwanted_table(unwanted))
        if not yes:
            say(f"{root}: {total} that this config does not want" + ("; --yes removes them" if unwanted else ""))
            return
        remove(unwanted, root)
        say(f"{root}: {total} removed")
