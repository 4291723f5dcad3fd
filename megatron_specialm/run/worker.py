"""One task in one process: check that the inputs are there, run the stage's function, write the completion marker last.

This module imports no torch: a stage's own module is imported when a task of its kind runs.
"""

import contextlib
import importlib
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_specialm import __version__
from megatron_specialm.base.accelerator import name_of_device
from megatron_specialm.base.artifacts import (
    LABEL,
    Cost,
    Marker,
    Report,
    Spent,
    artifact_folder,
    begin_artifact,
    check_artifact,
    finish_artifact,
    read_label,
)
from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import ArtifactError, machine_errors
from megatron_specialm.base.lock import HeldFolder, hold_task
from megatron_specialm.base.packages import installed_version
from megatron_specialm.base.printing import log_to_stderr
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.rendezvous import rendezvous, wait_for_key
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.context import Context
from megatron_specialm.graph.plan import PlannedTask, refuse_other_work
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import TaskId

POLL_SECONDS = 0.1
SHARED_SECONDS = 60  # for what another node has written to be seen


def work(
    pipeline: Pipeline,
    root: Path,
    planned: PlannedTask,
    world: World,
    environment: Mapping[str, str],
    _held: HeldFolder,
) -> None:
    """What a worker process runs: one rank's part of a task. SIGTERM ends a training after its step, with a checkpoint; other
    work, which has nothing to save, ends at once.

    Args:
        pipeline: the settings of the launch; `pipeline.yaml` of the run folder may have changed since.
        _held: the lock of the run folder, which this process shares until it ends.
    """
    os.environ.update(environment)
    log_to_stderr("%(asctime)s %(levelname)s %(message)s", level=logging.INFO, force=True)
    process_status = ProcessStatus()
    saves_steps = kind_of(pipeline.stages[planned.task.id.stage]).saves_steps
    with process_status.stop_on_signals() if saves_steps else contextlib.nullcontext():
        execute(pipeline, root, planned, world, process_status)


def execute(pipeline: Pipeline, root: Path, planned: PlannedTask, world: World, process_status: ProcessStatus) -> None:
    """Do one task and write its marker. Every rank that takes part calls this; rank 0 holds the task's lock and writes.

    Raises:
        ArtifactError: settings or files have changed since it was planned, or an input is missing or damaged.
        MachineError: another process works at it.
        SpecialmError: the stage's input or the machine is wrong, or not all ranks have arrived.
        Stopped: this process was asked to stop.
    """
    task, stage = planned.task, pipeline.stages[planned.task.id.stage]
    together = kind_of(stage).works_together(mpi=world.is_mpi)
    with contextlib.ExitStack() as stack:
        if world.is_first:
            stack.enter_context(hold_task(root, *task.id))
            refuse_other_work(pipeline, root, task, planned.made_from)
        process_status.begin(f"working on {task.id}")
        stack.enter_context(machine_errors())
        if together:
            rendezvous(world)  # a signal interrupts this wait, but not one in a collective
        inputs = {name: artifact_folder(root, *name, planned.made_from["inputs"][str(name)]) for name in task.inputs}
        folder = _begin(root, planned, inputs, world)
        context = Context(pipeline, task, inputs, root, folder, world, pipeline.local.threads, process_status)
        report: Report = importlib.import_module(f"megatron_specialm.stages.{stage.kind}").run(stage, context)
        if world.is_first:
            processes = world.world_size if together else 1
            seconds = report.lost_seconds + context.watch.seconds - report.apart.seconds
            own = _cost(Spent(report.tokens, report.slots, report.flops, seconds), processes)
            apart = _cost(report.apart, processes) if report.apart != Spent() else None
            marker = Marker(planned.digest, own, report.values, _versions(), apart=apart, earlier=report.earlier)
            finish_artifact(root, *task.id, marker)


def _cost(spent: Spent, processes: int) -> Cost:
    seconds = spent.seconds
    return Cost(spent.tokens, spent.flops, seconds, seconds * processes, name_of_device(), processes, spent.slots)


def _begin(root: Path, planned: PlannedTask, inputs: Mapping[TaskId, Path], world: World) -> Path:
    """On rank 0, check the inputs and make the folder; on others wait for it, which may take long."""
    name, digest = planned.task.id, planned.digest
    key = f"begun {name} {digest}"
    if world.is_first:
        for other, folder in inputs.items():
            check_artifact(folder)
            for part in _parts(root, other, folder):
                check_artifact(part)
        folder = begin_artifact(root, *name, digest=digest, made_from=planned.made_from)
        if world.world_size > 1:
            rendezvous(world).set(key, "")
        return folder
    wait_for_key(world, key)
    folder = artifact_folder(root, *name, digest)
    deadline = time.monotonic() + SHARED_SECONDS
    while time.monotonic() < deadline:
        if (folder / LABEL).exists() and read_label(folder)["digest"] == digest:
            return folder
        time.sleep(POLL_SECONDS)
    raise ArtifactError(
        f"{folder}: rank {world.rank} does not see this folder, which rank 0 has made: "
        "is the run folder on a filesystem that all nodes share?"
    )


def _parts(root: Path, name: TaskId, folder: Path) -> Iterator[Path]:
    """The artifacts whose files a reader of this one opens, too: those of the shards of a set."""
    for other, digest in read_label(folder)["made_from"].get("inputs", {}).items():
        stage, _, key = other.partition("/")
        if stage == name.stage:
            yield artifact_folder(root, stage, key, digest)


def _versions() -> dict[str, str]:
    packages = {name: installed_version(name) for name in ("torch", "megatron-core", "transformers", "numpy")}
    ours = {"megatron_specialm": __version__, "python": platform.python_version()}
    return {**ours, **{name: value for name, value in packages.items() if value}}
