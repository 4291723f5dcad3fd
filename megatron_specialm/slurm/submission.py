"""A submission: the config, the site profile and the code that jobs run from, frozen in the run folder, so that an edit after
`submit` changes nothing that was submitted."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import megatron_specialm
from megatron_specialm.base.environment import user_name
from megatron_specialm.base.errors import ConfigError
from megatron_specialm.base.files import write_json, write_text
from megatron_specialm.config.load import PACKAGE, dump_pipeline
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.site import Site, dump_site
from megatron_specialm.slurm import records
from megatron_specialm.slurm.jobs import Job
from megatron_specialm.slurm.nodes import excluded_nodes
from megatron_specialm.slurm.records import JobRecord
from megatron_specialm.slurm.sbatch import directives, render

GIT_SECONDS = 10


@dataclass(frozen=True)
class Code:
    """This package as it is now. `folder`: the place of its copy, for PYTHONPATH. `commit` is None outside a checkout;
    `modified`: there are uncommitted changes."""

    folder: Path
    version: str
    sha256: str
    commit: str | None
    modified: bool


def this_code(jobs: Path) -> Code:
    """The package that is running, and the place of its copy below a run's folder of jobs."""
    digest = hashlib.sha256()
    for path in _files():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{len(content)}\0".encode() + content)
    sha256 = digest.hexdigest()
    return Code(jobs / f"code-{sha256[:12]}", megatron_specialm.__version__, sha256, *_commit())


def freeze_code(code: Code) -> None:
    """Copy the package to its place, unless the copy is there."""
    if code.folder.exists():
        return
    temporary = code.folder.with_name(f".{code.folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for path in _files():
        copy = temporary / PACKAGE.name / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    temporary.rename(code.folder)


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _commit() -> tuple[str | None, bool]:
    """The commit of the package's checkout, and whether there are changes since."""
    if not (PACKAGE.parent / ".git").exists():
        return None, False
    try:
        commit = _git("rev-parse", "HEAD")
        return commit, bool(_git("status", "--porcelain", "--", PACKAGE.name))
    except (OSError, subprocess.SubprocessError):
        return None, False


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=GIT_SECONDS
    ).stdout.strip()


@dataclass(frozen=True)
class Submission:
    """A folder of frozen inputs from which jobs run. `folder`: the working directory of `submit`, to which paths of
    the config are relative."""

    number: str
    pipeline: Pipeline
    site: Site
    template: Path
    root: Path
    code: Code
    folder: Path

    @classmethod
    def next(cls, pipeline: Pipeline, site: Site, template: Path, root: Path, known: Sequence[JobRecord]) -> Self:
        """The submission after those that are known. It writes nothing.

        Raises:
            ConfigError: Slurm or Python would misread the run folder's name.
        """
        # A submit that died may have left a folder: its files must not be taken for those of this one.
        folders = [path.name for path in records.jobs_folder(root).glob("*") if path.name.isdecimal()]
        number = f"{1 + max(map(int, [*folders, *(job.submission for job in known)]), default=0):04d}"
        root = root.resolve()  # ranks in a container may have another working directory
        if found := [character for character in "%\\\n:" if character in str(root)]:
            raise ConfigError(
                f"root: {str(root)!r} has a {found[0]!r}, which Slurm or Python would read otherwise in the names of logs and "
                "in PYTHONPATH: choose another root"
            )
        # Artifacts of `reuse` are taken over before jobs are queued, whose nodes may not see the other folders.
        pipeline = pipeline.model_copy(update={"root": str(root), "reuse": []})
        site = _mounting(site, root, Path.cwd())
        return cls(number, pipeline, site, template, root, this_code(records.jobs_folder(root)), Path.cwd())

    def freeze(self) -> None:
        """Write the config, the profile and the code from which the jobs run."""
        freeze_code(self.code)
        home = records.submission_folder(self.root, self.number)
        write_text(home / "pipeline.yaml", dump_pipeline(self.pipeline))
        write_text(home / "site.yaml", dump_site(self.site), private=True)  # `environment` may hold a token
        code = {**asdict(self.code), "folder": str(self.code.folder)}
        origin = {"time": time.time(), "user": user_name(), "host": socket.gethostname(), "folder": str(self.folder)}
        write_json(home / "submission.json", {**origin, "code": code})

    def script(self, job: Job, *, after: Sequence[str], comment: str) -> str:
        options = directives(
            self.site, job.resources, name=f"{self.pipeline.name}.{job.name}", job=job.name, elements=len(job.elements),
            size=job.size, after=after, comment=comment, exclude=excluded_nodes(records.excluded_folder(self.root)),
        )  # fmt: skip
        home = records.submission_folder(self.root, self.number)
        python = self.site.python or sys.executable
        inside = self.site.container.python if self.site.container else python
        supervise: list[Any] = [
            python, "-m", "megatron_specialm", "supervise", "--site", home / "site.yaml", "--state", home / job.name,
            "--excluded", records.excluded_folder(self.root), "--launcher", job.launcher,
            "--ranks", job.size.ranks, "--ranks-per-node", job.size.ranks_per_node,
        ]  # fmt: skip
        work: list[Any] = [inside, "-m", "megatron_specialm", "work", home / f"{job.name}.json"]
        return render(
            self.template, self.site, directives=options, folder=self.folder, code=self.code.folder,
            command=[*supervise, "--", *work],
        )  # fmt: skip


def _mounting(site: Site, *folders: Path) -> Site:
    """The profile, with these folders mounted under their own names in its container."""
    if site.container is None:
        return site
    mounts = dict.fromkeys([*site.container.mounts, *(f"{folder}:{folder}" for folder in folders)])
    return site.model_copy(update={"container": site.container.model_copy(update={"mounts": list(mounts)})})
