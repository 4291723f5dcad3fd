"""Run a config as jobs on the tests' Slurm cluster, disturb them at random, and submit again until all tasks are done."""

import contextlib
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.cluster.runs import Run
from tests.cluster.testbed import Cluster

from .config import write_config
from .local import HELD, compare, not_done

PATIENCE_SECONDS = 300.0  # for undisturbed jobs
LONGEST_SECONDS = 12.0  # from one disturbance to the next
POLL_SECONDS = 0.3


@dataclass
class DisturbedJobs:
    """A run folder in progress, the disturbances of its jobs, and the faults found."""

    run: Run
    until: str  # the stage with whose inputs the run ends
    random: random.Random
    happened: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    launches: int = 0

    def submit(self) -> None:
        """Submit the tasks that are neither done nor queued."""
        self.launches += 1
        self.run.submit("--until", self.until)

    def queue(self, *states: str) -> list[str]:
        """Slurm's ids of the jobs and array elements in the queue, in all states or in some."""
        wanted = [f"--states={','.join(states)}"] if states else []
        return self.run.cluster.run("squeue", "--noheader", "--array", "--format=%i", *wanted).split()

    def processes(self, word: str) -> list[psutil.Process]:
        """The processes of jobs of this run that have a word in their command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if word in words and any(str(self.run.root) in part for part in words):
                found.append(process)
        return found

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until the queue is empty. Returns whether it is empty."""
        deadline = time.monotonic() + seconds
        while queued := self.queue():
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        return not queued


def _cancel(jobs: DisturbedJobs) -> None:
    """Cancel all jobs, as a user does."""
    jobs.run.cluster.run("scancel", *jobs.queue())


def _requeue(jobs: DisturbedJobs) -> None:
    """Requeue, as a preemption does."""
    if running := jobs.queue("RUNNING"):
        with contextlib.suppress(AssertionError):  # it has ended in the meantime
            jobs.run.cluster.run("scontrol", "requeue", jobs.random.choice(running))


def _kill(word: str) -> Callable[[DisturbedJobs], None]:
    def disturb(jobs: DisturbedJobs) -> None:
        if found := jobs.processes(word):
            with contextlib.suppress(psutil.Error):
                jobs.random.choice(found).kill()

    return disturb


def _lose_node(jobs: DisturbedJobs) -> None:
    """Kill everything on a node; it returns a little later."""
    cluster = jobs.run.cluster
    name = jobs.random.choice(sorted(cluster.nodes))
    cluster.power_off(name)
    jobs.wait(2.0)
    cluster.power_on(name)


def _submit_again(jobs: DisturbedJobs) -> None:
    """Submit again: queued tasks are not queued twice."""
    jobs.submit()


def _run_beside(jobs: DisturbedJobs) -> None:
    """Run on the login node: it is refused while a job does one of its tasks."""
    command = jobs.run.command("run", "--until", jobs.until)
    done = subprocess.run(
        command, cwd=jobs.run.folder, env=jobs.run.environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    if done.returncode not in (0, HELD):
        jobs.faults.append(f"a run beside the jobs: exit code {done.returncode}: {done.stderr[-600:]}")


DISTURBANCES: dict[str, Callable[[DisturbedJobs], None]] = {
    "scancel": _cancel,
    "scontrol requeue": _requeue,
    "kill -9 of a rank": _kill("work"),
    "kill -9 of a supervisor": _kill("supervise"),
    "a lost node": _lose_node,
    "a second submit": _submit_again,
    "a run beside the jobs": _run_beside,
}


def disturbed_jobs(
    cluster: Cluster, folder: Path, straight: Path, *, seed: int, at_most: int, steps: int, every: int, until: str
) -> DisturbedJobs:
    """Run the config up to a stage as jobs in a new working directory, with at most so many disturbances. Compare the result
    with an undisturbed run."""
    write_config(folder, steps=steps, every=every)
    site = {"jobs": {"default": {"processes_per_node": 1}, "train": {"tasks_per_job": 1}}}
    jobs = DisturbedJobs(
        Run(cluster, folder, site=site, name="run", config=Path("config.yaml")), until, random.Random(seed)
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not_done(folder, until=until):
        jobs.submit()
        while not jobs.wait(jobs.random.uniform(0, LONGEST_SECONDS)):
            if time.monotonic() > deadline:
                jobs.faults.append(f"not done {PATIENCE_SECONDS:.0f} s behind the last disturbance")
                return jobs
            if jobs.happened.total() < at_most:
                kind = jobs.random.choice(list(DISTURBANCES))
                jobs.happened[kind] += 1
                DISTURBANCES[kind](jobs)
                deadline = time.monotonic() + PATIENCE_SECONDS
        if time.monotonic() > deadline:
            jobs.faults.append(f"not done {PATIENCE_SECONDS:.0f} s behind the last disturbance")
            return jobs
    alive = [process.pid for word in ("work", "supervise") for process in jobs.processes(word)]
    jobs.faults += [f"alive behind the last job: {alive}"] if alive else []
    jobs.run.specialm("results")  # jobs write no tables
    jobs.faults += compare(straight, folder, until=until)
    return jobs
