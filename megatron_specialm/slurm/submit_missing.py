"""`specialm submit`: queue the tasks that a config's run folder lacks, as Slurm jobs."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_specialm.base.lock import hold_folder
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.site import Site, template_of
from megatron_specialm.graph.plan import link_artifacts, make_plan, refuse_foreign_folder, select_tasks, write_resolved
from megatron_specialm.graph.redo import Redo, find_redo
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.preflight import refuse_too_little_held_out, refuse_what_gpus_lack
from megatron_specialm.run.reuse import refuse_other_folders, reuse_summary, take_over
from megatron_specialm.slurm.jobs import Job, jobs_of, missing_tasks
from megatron_specialm.slurm.records import JobRecord
from megatron_specialm.slurm.state import adopt_unattended, live_tasks, submitted_jobs
from megatron_specialm.slurm.submission import Submission
from megatron_specialm.slurm.submit import LOCK_SECONDS, preview, recover, submit


@dataclass(frozen=True)
class Outcome:
    """What was submitted, or would be.

    Attributes:
        scripts: of a dry run: each job and its script.
        queued: each job and its record.
        counts: the tasks, in words.
    """

    scripts: list[tuple[Job, str]]
    queued: list[tuple[Job, JobRecord]]
    counts: str


def submit_missing(
    pipeline: Pipeline,
    profile: Site,
    profile_path: Path,
    *,
    only: str | None,
    until: str | None,
    keys: Sequence[str] | None,
    dry_run: bool,
    confirm: Callable[[Mapping[TaskId, Redo]], None],
) -> Outcome:
    """Queue what a config's run folder lacks and no live job makes.

    Args:
        only, until, keys: the tasks that are asked for, as `select_tasks` takes them.
        dry_run: write and queue nothing.
        confirm: called with the finished work that would be repeated, before anything is written; raises to stop.
    """
    refuse_other_folders(pipeline)
    root = Path(pipeline.root)
    refuse_foreign_folder(pipeline, root)
    # A dry run need not be able to write.
    with contextlib.nullcontext() if dry_run else hold_folder(root, wait_seconds=LOCK_SECONDS):
        if not dry_run:
            adopt_unattended(root)
        plan = make_plan(pipeline, root)
        chosen = select_tasks(plan, only=only, until=until, keys=keys, check_inputs=False)
        known = submitted_jobs(root) if dry_run else recover(root)
        live = live_tasks(known)
        missing = missing_tasks(plan, chosen, live)
        elsewhere = {name: planned for name, planned in missing.items() if planned.elsewhere is not None}
        missing = {name: planned for name, planned in missing.items() if planned.elsewhere is None}
        submission = Submission.next(pipeline, profile, template_of(profile, profile_path), root, known)
        stages = {name.stage for name in missing}
        refuse_what_gpus_lack(pipeline, profile.gpu, stages=stages)
        refuse_too_little_held_out(pipeline, plan, root, stages=stages)
        jobs = jobs_of(pipeline, profile, missing)
        confirm(find_redo(pipeline, plan, root, missing))
        if dry_run:
            scripts = list(preview(submission, jobs, live=live))
            return Outcome(scripts, [], f"{len(missing)} tasks to submit{reuse_summary(elsewhere)}")
        if missing or elsewhere:
            write_resolved(pipeline, root)
        take_over(elsewhere, root)
        link_artifacts(plan, root)
        queued = list(zip(jobs, submit(submission, jobs, known=known, live=live), strict=True))
    done = sum(planned.state == "done" for planned in chosen.values())
    coming = len(chosen) - done - len(missing) - len(elsewhere)
    counts = f"{len(missing)} tasks submitted, {coming} on their way, {done} done{reuse_summary(elsewhere)}"
    return Outcome([], queued, counts)
