"""Queue jobs in Slurm, each dependent on those whose results it reads.

Nothing is queued twice: the caller holds the run folder, a job's record is written before sbatch is called, and its id as soon
as sbatch has answered. When a submit dies between the two, the next one finds the job by its comment.
"""

import contextlib
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_specialm.base.errors import ConfigError, MachineError
from megatron_specialm.base.files import write_json, write_text
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm import records
from megatron_specialm.slurm.commands import NO_NODES, find_by_comment, sbatch_environment, slurm
from megatron_specialm.slurm.jobs import Job
from megatron_specialm.slurm.nodes import EXCLUDED, excluded_nodes
from megatron_specialm.slurm.records import JobRecord
from megatron_specialm.slurm.state import Live, submitted_jobs
from megatron_specialm.slurm.submission import Submission

SBATCH_SECONDS = 60
SAFE_ARRAY = 1000  # elements that Slurm accepts by default
LOCK_SECONDS = 120  # for another submit of the same run folder to end


class NotQueued(MachineError):
    """A job that is certainly not in Slurm."""


def recover(root: Path) -> list[JobRecord]:
    """The registry, repaired: a record without an id is of a submit that died during sbatch. It gets the id of the job that
    sbatch made, or is dropped where there is none."""
    repaired = submitted_jobs(root)
    if repaired != records.read_registry(root):
        records.write_registry(root, repaired)
    return repaired


def submit(
    submission: Submission, jobs: Sequence[Job], *, known: Sequence[JobRecord], live: Mapping[TaskId, Live]
) -> list[JobRecord]:
    """Queue jobs; the records of the new ones.

    Raises:
        ConfigError: the template cannot be used.
        MachineError: sbatch refuses a job. Those before it are queued and on record, and the same command continues from
            there. Where there are none, no file is left.
    """
    if not jobs:
        return []
    _refuse_long_arrays(jobs)
    queued: list[JobRecord] = []
    with _removed_if_nothing_is_queued(submission):
        submission.freeze()
        for job in jobs:
            record = _record(submission, job, after=dependencies(job, zip(jobs, queued, strict=False), live))
            place = submission.root, submission.number, job.name
            elements = [
                [{**asdict(task), "made_from": job.made_from[task.key]} for task in element] for element in job.elements
            ]
            write_json(records.job_path(*place), {"stage": job.stage, "elements": elements})
            script = records.script_path(*place)
            write_text(script, submission.script(job, after=record.after, comment=record.comment), private=True)
            records.write_registry(submission.root, [*known, *queued, record])
            try:
                queued.append(replace(record, slurm_id=_sbatch(script, record.comment)))
            except NotQueued as error:
                records.write_registry(submission.root, [*known, *queued])
                folder = records.excluded_folder(submission.root)
                if NO_NODES in str(error) and (nodes := excluded_nodes(folder)):
                    listed = f"{folder / EXCLUDED} excludes {', '.join(nodes)}: remove those that are repaired"
                    raise NotQueued(f"{error}; {listed}") from None
                raise
            records.write_registry(submission.root, [*known, *queued])
    return queued


@contextlib.contextmanager
def _removed_if_nothing_is_queued(submission: Submission) -> Iterator[None]:
    """Remove the submission's files where submitting fails before a job is, or may be, queued."""
    fresh_code = not submission.code.folder.exists()
    try:
        yield
    except BaseException:
        registry = records.read_registry(submission.root)
        if all(job.submission != submission.number for job in registry):
            shutil.rmtree(records.submission_folder(submission.root, submission.number), ignore_errors=True)
            if fresh_code:
                shutil.rmtree(submission.code.folder, ignore_errors=True)
        if not registry:
            records.registry_path(submission.root).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other files are in it
                records.jobs_folder(submission.root).rmdir()
        raise


def preview(submission: Submission, jobs: Sequence[Job], *, live: Mapping[TaskId, Live]) -> Iterator[tuple[Job, str]]:
    """Each job with the script that would be queued, with names of jobs in the place of ids. Writes nothing."""
    shown: list[JobRecord] = []
    for job in jobs:
        after = dependencies(job, zip(jobs, shown, strict=False), live)
        record = replace(_record(submission, job, after=after), slurm_id=f"<{job.name}>")
        yield job, submission.script(job, after=after, comment=record.comment)
        shown.append(record)


def _record(submission: Submission, job: Job, *, after: Sequence[str]) -> JobRecord:
    return JobRecord(
        submission=submission.number, name=job.name, stage=job.stage, slurm_id=None, comment=f"specialm-{uuid.uuid4().hex}",
        elements=job.elements, after=tuple(after), submitted=time.time(), ranks=job.size.ranks,
    )  # fmt: skip


def dependencies(job: Job, queued: Iterable[tuple[Job, JobRecord]], live: Mapping[TaskId, Live]) -> list[str]:
    """The ids on which a job depends: whole arrays where it reads from all their elements, otherwise those elements alone, so
    that an element that fails stops only jobs that read from it."""
    found = {live[name].slurm_id for name in job.inputs if name in live}
    for other, record in queued:
        read = {number for name in job.inputs if (number := other.element_of(name)) is not None}
        if len(read) == len(other.elements):
            found.add(str(record.slurm_id))
        else:
            found.update(f"{record.slurm_id}_{number}" for number in read)
    return sorted(found)


def _refuse_long_arrays(jobs: Sequence[Job]) -> None:
    longest = max(jobs, key=lambda job: len(job.elements))
    if len(longest.elements) <= SAFE_ARRAY:
        return
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config"))
    if found and len(longest.elements) > int(found.group(1)) - 1:
        raise ConfigError(
            f"{longest.name}: {len(longest.elements)} elements, and this cluster's arrays have at most "
            f"{int(found.group(1)) - 1} (MaxArraySize): raise jobs.{longest.stage}.tasks_per_job in the site profile"
        )


def _sbatch(script: Path, comment: str) -> str:
    """Queue a script from its own folder, where its log goes; Slurm's id of the job.

    Sites wrap sbatch: it may fail or give an unknown answer after the job has been queued. Then Slurm is asked.

    Raises:
        NotQueued: sbatch refuses, and Slurm knows no such job.
        MachineError: whether the job is queued cannot be told.
    """
    try:
        outcome = subprocess.run(
            ["sbatch", "--parsable", script.name], cwd=script.parent, env=sbatch_environment(), capture_output=True, text=True,
            errors="replace", stdin=subprocess.DEVNULL, timeout=SBATCH_SECONDS,
        )  # fmt: skip
    except FileNotFoundError:
        raise NotQueued("sbatch: not found: submit on a login node of a Slurm cluster, or use `specialm run`") from None
    except subprocess.TimeoutExpired:
        what, refused = f"sbatch did not answer within {SBATCH_SECONDS} s", False
    else:
        if outcome.returncode == 0 and (slurm_id := id_in(outcome.stdout)):
            return slurm_id
        refused = outcome.returncode != 0
        what = " ".join(outcome.stderr.split()) or f"exit code {outcome.returncode}"
        if not refused:
            what = f"sbatch answers {outcome.stdout.strip()!r}, in which there is no job's id"
    try:
        found = find_by_comment(comment)
    except MachineError as error:
        raise MachineError(
            f"{script}: {what}; whether the job is queued cannot be asked ({error}): submit again: that looks for a job with "
            f"the comment {comment}, and queues nothing twice"
        ) from None
    if found is not None:
        return found
    if refused:
        raise NotQueued(f"{script}: {what}: correct the site profile and submit again: what is queued stays")
    raise MachineError(
        f"{script}: {what}, and squeue shows no job with the comment {comment}: look for it, cancel it if it is there, and "
        "submit again"
    )


def id_in(answer: str) -> str | None:
    """The job's id in sbatch's output: `123` or, in a federation, `123;cluster` in a line of its own, or a wrapper's sentence.
    None where there is none, or more than one."""
    found = re.findall(
        r"^[ \t]*(\d+)(?:;\S*)?[ \t\r]*$|\bSubmitted batch job (\d+)\b", answer, re.MULTILINE | re.IGNORECASE
    )
    ids = {alone or in_sentence for alone, in_sentence in found}
    return ids.pop() if len(ids) == 1 else None
