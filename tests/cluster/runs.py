"""A working directory on the login node: text, a config, a site profile, and the commands of a user."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from megatron_specialm.checkpoint.opening import newest_checkpoint, read_checkpoint
from megatron_specialm.checkpoint.steps import find_final
from megatron_specialm.slurm.records import Attempt, read_attempts
from tests.cluster.testbed import Cluster

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "pipelines" / "smoke.yaml"
SITE: dict[str, Any] = {
    "template": str(ROOT / "slurm" / "stage.sbatch.template"),
    "jobs": {
        "default": {"time": "00:10:00", "memory": "1G", "tasks_per_job": 8, "processes_per_node": 2, "concurrency": 2},
        "train": {"tasks_per_job": 3},
    },
    # Short, for tests; a rank that imports torch on a busy machine may well be silent for some seconds.
    "limits": {"heartbeat_seconds": 0.5, "silent_seconds": 15, "hang_seconds": 25, "stop_seconds": 30},
    "preflight": {"enabled": False},
}


@dataclass
class Run:
    """A run of a config, with overrides, on a cluster."""

    cluster: Cluster
    folder: Path
    overrides: list[str] = field(default_factory=list)
    site: dict[str, Any] = field(default_factory=dict)  # over SITE
    name: str = "runs/smoke"
    config: Path = CONFIG

    @property
    def root(self) -> Path:
        """The run folder."""
        return self.folder / self.name

    def command(self, *arguments: str) -> list[str]:
        """A command of ours on this config."""
        verb, *rest = arguments
        return [
            sys.executable,
            "-m",
            "megatron_specialm",
            verb,
            str(self.config),
            f"root={self.name}",
            *self.overrides,
            *rest,
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Of a user of this cluster who has this project."""
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**self.cluster.environment, "PATH": programs, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}

    def specialm(self, *arguments: str, code: int = 0) -> str:
        """What a command prints; it is to end with this exit code."""
        done = subprocess.run(
            self.command(*arguments), cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *arguments: str, code: int = 0) -> str:
        """Submit the config by the site's profile; what was printed."""
        path = self.folder / "site.yaml"
        path.write_text(yaml.safe_dump(_merged(SITE, self.site)))
        return self.specialm("submit", "--site", str(path), *arguments, code=code)

    def status(self) -> dict[str, dict[str, Any]]:
        """What `status --json` says, by stage."""
        return {stage["stage"]: stage for stage in json.loads(self.specialm("status", "--json"))["stages"]}

    def job(self, stage: str) -> str:
        """The id of the stage's newest job."""
        jobs = json.loads((self.root / "jobs/jobs.json").read_text())["jobs"]
        return [job["slurm_id"] for job in jobs if job["stage"] == stage][-1]

    def wait(self, stage: str, timeout: float = 90) -> list[str]:
        """Wait until the stage's newest job has ended; the states of its elements."""
        return [job["JobState"] for job in self.cluster.wait(self.job(stage), timeout)]

    def attempts(self, stage: str, element: int = 0, submission: str = "0001") -> list[Attempt]:
        """The attempts at an element of the stage's job."""
        return read_attempts(self.root / "jobs" / submission / f"{stage}.{element}")

    def outcomes(self, stage: str, **which: Any) -> list[str]:
        """How they ended; `lost` without an end."""
        return [attempt.end.outcome if attempt.end else "lost" for attempt in self.attempts(stage, **which)]

    def log(self, stage: str, element: int = 0) -> str:
        """What an element has said in all attempts."""
        return (self.root / "jobs/0001" / f"{stage}.{element}.log").read_text()

    def saved_step(self, stage: str, key: str = "generic") -> int:
        """The step of the newest checkpoint that verifies; 0 where there is none."""
        folder, _ = newest_checkpoint(self.root / stage / key)
        return 0 if folder is None else int(folder.name.removeprefix("step_"))

    def until(self, question: Callable[[], Any], what: str, timeout: float = 60) -> Any:
        """Ask until the answer is true."""
        return self.cluster.until(question, what, timeout)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank of this run."""
        return self.process("work", SLURM_PROCID=str(number))

    def process(self, word: str, **variables: str) -> psutil.Process:
        """The Python process of this run, on any node, with a word in its command line and such variables."""

        def find() -> psutil.Process | None:
            for process in psutil.process_iter(["cmdline", "name"]):
                words = process.info["cmdline"] or []
                ours = any(word in part for part in words) and any(str(self.root) in part for part in words)
                if ours and "supervise" not in words and process.info["name"].startswith("python"):
                    with contextlib.suppress(psutil.Error):
                        environment = process.environ()
                        if variables.items() <= environment.items():
                            return process
            return None

        return self.until(find, f"{word} has started with {variables}", 60)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(over[key], dict)}
    return {**base, **over, **both}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The outcome of a training."""
    return dict(read_checkpoint(find_final(folder)).weights)


def assert_same_bits(one: Path, other: Path) -> None:
    """Two trainings have ended with the same weights."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def prepared(source: Path, folder: Path, *stages: str) -> Path:
    """A working directory with the text of another, and what some stages have made there."""
    folder.mkdir(exist_ok=True)
    (folder / "data").symlink_to(source / "data")
    for stage in stages:
        for place in (f"artifacts/{stage}", stage):
            shutil.copytree(source / "runs/smoke" / place, folder / "runs/smoke" / place, symlinks=True)
    if stages:
        shutil.copy(source / "runs/smoke/pipeline.yaml", folder / "runs/smoke/pipeline.yaml")
    return folder


def local_environment() -> dict[str, str]:
    """Without a cluster."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
