"""The program of each rank of a submitted job: do the missing tasks of an array element, one after the other."""

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_specialm.base.artifacts import is_complete
from megatron_specialm.base.environment import discover_world
from megatron_specialm.base.errors import ArtifactError, MachineError
from megatron_specialm.base.files import sha256_json
from megatron_specialm.config.load import load_pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.plan import PlannedTask
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.inline import rank_lifecycle, run_task
from megatron_specialm.run.preflight import refuse_what_the_machine_lacks
from megatron_specialm.run.processes import ignore_expected_warnings, limit_threads
from megatron_specialm.slurm.records import read_job_file


def work(job_file: Path, *, element: int | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Do the tasks of an element of `<run folder>/jobs/<submission>/<job>.json`, with the resolved config beside it.

    Args:
        element: its number; by default that of this process's Slurm array task.

    Raises:
        SpecialmError: the job's file, the config, an input or the machine is wrong.
        Stopped: this process was asked to stop.
    """
    world = discover_world()
    with rank_lifecycle(world) as process_status:
        root = job_file.resolve().parents[2]
        number, job = _element(environ) if element is None else element, read_job_file(job_file)
        if not 0 <= number < len(job.elements):
            raise ArtifactError(f"{job_file}: has no element {number}: submit again")
        pipeline = load_pipeline(job_file.parent / "pipeline.yaml")
        threads = _threads(environ) or pipeline.local.threads
        limit_threads(threads)
        ignore_expected_warnings()
        pipeline = pipeline.model_copy(update={"local": pipeline.local.model_copy(update={"threads": threads})})
        refuse_what_the_machine_lacks(pipeline, stages=[job.stage], alone=False)
        graph = build_graph(pipeline)
        for task in job.elements[number]:
            name, digest = TaskId(job.stage, task.key), sha256_json(task.made_from)
            if name not in graph:
                raise ArtifactError(f"{job_file}: {name} is no task of the config beside it: submit again")
            if not is_complete(root, *name, digest=digest):
                planned = PlannedTask(graph[name], digest, "to do", task.made_from)
                run_task(pipeline, root, planned, world, process_status)


def _element(environ: Mapping[str, str]) -> int:
    number = environ.get("SLURM_ARRAY_TASK_ID", "")
    if not number.isdecimal():
        raise MachineError(
            f"SLURM_ARRAY_TASK_ID={number!r}: must be a number, as in an array of Slurm; or give --element"
        )
    return int(number)


def _threads(environ: Mapping[str, str]) -> int | None:
    """The CPUs of this rank. Under torchrun all ranks of a node are one Slurm task and divide its CPUs."""
    cpus = environ.get("SLURM_CPUS_PER_TASK", "")
    return max(1, int(cpus) // int(environ.get("LOCAL_WORLD_SIZE", "1"))) if cpus.isdecimal() else None
