"""Many small jobs in one set of processes: starting a process costs more than what most of them do."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_specialm.base.environment import World
from megatron_specialm.run.processes import limit_threads
from tests.training import Ranks


class Job(NamedTuple):
    """What each process does for one job: `function(world, folder, *arguments)`, with a folder of the job's own."""

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...] = ()


def run_jobs(folder: Path, size: int, jobs: Sequence[Job]) -> None:
    """Run jobs one after the other on `size` processes, and expect all to end well."""
    limit_threads(1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_specialm.stages.train"])
    for job in jobs:
        (folder / job.name).mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_rank, args=(folder, rank, size, jobs)) for rank in range(size)]
    for process in processes:
        process.start()
    codes = Ranks(processes).join(100 + 20 * len(jobs))
    assert codes == [0] * size, "\n".join((folder / f"log-{size}-{rank}").read_text() for rank in range(size))


def _rank(folder: Path, rank: int, size: int, jobs: Sequence[Job]) -> None:
    with (folder / f"log-{size}-{rank}").open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    for job in jobs:
        print(job.name, flush=True)
        world = World(rank, size, rank, f"file://{folder / job.name}/meeting-{size}", "test")
        job.function(world, folder / job.name, *job.arguments)
