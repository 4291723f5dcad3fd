"""Jobs into Slurm's queue, each behind those whose work it reads.

Nothing is ever queued twice: the caller holds the run folder, a job's record is written before sbatch is called, and its
id as soon as that has answered. When a submit dies between the two, the next one finds the job by its comment.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from megatron_specialm.base.environment import user_name
from megatron_specialm.base.errors import ConfigError, MachineError
from megatron_specialm.base.files import write_json, write_text
from megatron_specialm.config.load import dump_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.site import Site, dump_site
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.slurm import records
from megatron_specialm.slurm.code import Code, freeze_code, this_code
from megatron_specialm.slurm.jobs import Job
from megatron_specialm.slurm.missing import Live
from megatron_specialm.slurm.nodes import excluded_nodes
from megatron_specialm.slurm.queue import find_by_comment, slurm
from megatron_specialm.slurm.records import JobRecord
from megatron_specialm.slurm.sbatch import directives, render

SBATCH_SECONDS = 60
SAFE_ARRAY = 1000  # elements that Slurm takes unless it is told to take fewer
LOCK_SECONDS = 120  # for another submit of the same run folder to end
# What a launcher or a job around us may have set would mislead the job's own ranks; SBATCH_* overrule the script.
NOT_INHERITED = (
    "SBATCH_",
    "SLURM_",
    "OMPI_",
    "PMIX_",
    "PMI_",
    "TORCHELASTIC_",
    "SPECIALM_",
    "MASTER_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
)


class NotQueued(MachineError):
    """A job that Slurm has not got, for certain."""


@dataclass(frozen=True)
class Submission:
    """A folder of frozen inputs that jobs run from. `folder` is where `submit` was called; the config's paths start there."""

    number: str
    pipeline: Pipeline
    site: Site
    template: Path
    root: Path
    code: Code
    folder: Path

    @classmethod
    def next(cls, pipeline: Pipeline, site: Site, template: Path, root: Path, known: Sequence[JobRecord]) -> Self:
        """The one after those that are known. It writes nothing.

        Raises:
            ConfigError: Slurm or Python would take the run folder's name for something else.
        """
        # A folder may be there of a submit that died: what its jobs have left must not be taken for that of ours.
        folders = [path.name for path in records.jobs_folder(root).glob("*") if path.name.isdecimal()]
        number = f"{1 + max(map(int, [*folders, *(job.submission for job in known)]), default=0):04d}"
        root = root.resolve()  # ranks may stand elsewhere, in a container
        if found := [character for character in "%\\\n:" if character in str(root)]:
            raise ConfigError(
                f"root: {str(root)!r} has a {found[0]!r}, which Slurm or Python would read otherwise in the names of logs and "
                "in PYTHONPATH: choose another root"
            )
        # What is to be reused has been taken over when jobs are queued, and they may not see where it was.
        pipeline = pipeline.model_copy(update={"root": str(root), "reuse": []})
        site = _mounting(site, root, Path.cwd())
        return cls(number, pipeline, site, template, root, this_code(records.jobs_folder(root)), Path.cwd())

    def freeze(self) -> None:
        """Write down the config, the profile and the code that its jobs run from."""
        freeze_code(self.code)
        home = records.submission_folder(self.root, self.number)
        write_text(home / "pipeline.yaml", dump_pipeline(self.pipeline))
        write_text(home / "site.yaml", dump_site(self.site), private=True)  # `environment` may hold a token
        code = {**asdict(self.code), "folder": str(self.code.folder)}
        who = {"time": time.time(), "user": user_name(), "host": socket.gethostname(), "folder": str(self.folder)}
        write_json(home / "submission.json", {**who, "code": code})

    def script(self, job: Job, *, after: Sequence[str], comment: str) -> str:
        """A job's script."""
        options = directives(
            self.site, job.resources, name=f"{self.pipeline.name}.{job.name}", job=job.name, elements=len(job.elements),
            shape=job.shape, after=after, comment=comment, exclude=excluded_nodes(records.excluded_folder(self.root)),
        )  # fmt: skip
        home = records.submission_folder(self.root, self.number)
        python = self.site.python or sys.executable
        inside = self.site.container.python if self.site.container else python
        supervise: list[Any] = [
            python, "-m", "megatron_specialm", "supervise", "--site", home / "site.yaml", "--state", home / job.name,
            "--excluded", records.excluded_folder(self.root), "--launcher", job.launcher,
            "--ranks", job.shape.ranks, "--ranks-per-node", job.shape.ranks_per_node,
        ]  # fmt: skip
        work: list[Any] = [inside, "-m", "megatron_specialm", "work", home / f"{job.name}.json"]
        return render(
            self.template, self.site, directives=options, folder=self.folder, code=self.code.folder,
            command=[*supervise, "--", *work],
        )  # fmt: skip


def _mounting(site: Site, *folders: Path) -> Site:
    """The profile, with folders that its container is to show in their places."""
    if site.container is None:
        return site
    mounts = dict.fromkeys([*site.container.mounts, *(f"{folder}:{folder}" for folder in folders)])
    return site.model_copy(update={"container": site.container.model_copy(update={"mounts": list(mounts)})})


def recover(root: Path) -> list[JobRecord]:
    """The registry, mended: a record without an id is of a submit that died while sbatch was called. It gets the id of the
    job that sbatch has made, or is dropped where there is none."""
    jobs = records.read_registry(root)
    if all(job.slurm_id is not None for job in jobs):
        return jobs
    found = [job if job.slurm_id is not None else replace(job, slurm_id=find_by_comment(job.comment)) for job in jobs]
    mended = [job for job in found if job.slurm_id is not None]
    records.write_registry(root, mended)
    return mended


def submit(
    submission: Submission, jobs: Sequence[Job], *, known: Sequence[JobRecord], live: Mapping[TaskId, Live]
) -> list[JobRecord]:
    """Queue jobs; the records of the new ones.

    Raises:
        ConfigError: the template cannot be used.
        MachineError: sbatch refuses a job. Those before it are queued and on record: the same command goes on from there.
            Where there are none, nothing is left.
    """
    if not jobs:
        return []
    _refuse_long_arrays(jobs)
    queued: list[JobRecord] = []
    with _leaving_no_half(submission):
        submission.freeze()
        for job in jobs:
            record = _record(submission, job, after=dependencies(job, zip(jobs, queued, strict=False), live))
            place = submission.root, submission.number, job.name
            write_json(records.job_path(*place), {"stage": job.stage, "elements": _elements(job)})
            script = records.script_path(*place)
            write_text(script, submission.script(job, after=record.after, comment=record.comment), private=True)
            records.write_registry(submission.root, [*known, *queued, record])
            try:
                queued.append(replace(record, slurm_id=_sbatch(script, record.comment)))
            except NotQueued:
                records.write_registry(submission.root, [*known, *queued])
                raise
            records.write_registry(submission.root, [*known, *queued])
    return queued


@contextlib.contextmanager
def _leaving_no_half(submission: Submission) -> Iterator[None]:
    """Where submitting fails before a job is, or may be, queued: leave nothing of the submission."""
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
    """Each job with the script that it would be queued by; where an id would stand, the job's name. Writes nothing."""
    shown: list[JobRecord] = []
    for job in jobs:
        after = dependencies(job, zip(jobs, shown, strict=False), live)
        record = replace(_record(submission, job, after=after), slurm_id=f"<{job.name}>")
        yield job, submission.script(job, after=after, comment=record.comment)
        shown.append(record)


def _record(submission: Submission, job: Job, *, after: Sequence[str]) -> JobRecord:
    return JobRecord(
        submission=submission.number, name=job.name, stage=job.stage, slurm_id=None, comment=f"specialm-{uuid.uuid4().hex}",
        elements=job.elements, after=tuple(after), submitted=time.time(), ranks=job.shape.ranks,
    )  # fmt: skip


def _elements(job: Job) -> list[list[dict[str, Any]]]:
    """What a job's ranks are told of their tasks."""
    return [[{**asdict(task), "made_from": job.made_from[task.key]} for task in element] for element in job.elements]


def dependencies(job: Job, queued: Iterable[tuple[Job, JobRecord]], live: Mapping[TaskId, Live]) -> list[str]:
    """What a job waits for: arrays as a whole where it reads of all their elements, otherwise those elements alone, so that
    one which fails stops nobody who does not read it."""
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
    """Queue a script from its own folder, in which its log is to stand; Slurm's id of the job.

    Sites wrap sbatch: it may fail, or say nothing that we understand, after the job has been queued. Then Slurm is asked.

    Raises:
        NotQueued: sbatch refuses, and Slurm knows no such job.
        MachineError: whether the job is queued cannot be told.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
    if "SLURM_CONF" in os.environ:
        environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    try:
        outcome = subprocess.run(
            ["sbatch", "--parsable", script.name], cwd=script.parent, env=environment, capture_output=True, text=True,
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
    """The job's id in what sbatch prints: `123` or, in a federation, `123;cluster` in a line of its own, or the sentence
    that wrappers give instead. None where there is none, or more than one."""
    found = re.findall(
        r"^[ \t]*(\d+)(?:;\S*)?[ \t\r]*$|\bSubmitted batch job (\d+)\b", answer, re.MULTILINE | re.IGNORECASE
    )
    ids = {alone or spoken for alone, spoken in found}
    return ids.pop() if len(ids) == 1 else None
