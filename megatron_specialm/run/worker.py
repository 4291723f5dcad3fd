"""One task in one process: check that the inputs are there, run the stage's function, write the completion marker last.

This module imports no torch: a stage's own module is imported when a task of its kind runs.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

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
from megatron_specialm.base.environment import World, discover_world
from megatron_specialm.base.errors import ArtifactError, SpecialmError, machine_errors
from megatron_specialm.base.files import sha256_json
from megatron_specialm.base.lock import HeldFolder, hold_task
from megatron_specialm.base.orphans import end_with
from megatron_specialm.base.output import lasting_output
from megatron_specialm.base.packages import installed_version
from megatron_specialm.base.printing import log_to_stderr, say
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.rendezvous import await_word, meet
from megatron_specialm.base.temporary import place_sockets
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.plan import refuse_other_work
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import Task, TaskId
from megatron_specialm.stages.context import Context

POLL_SECONDS = 0.1
SHARED_SECONDS = 60  # for what another node has written to be seen
# What Megatron-Core says at import on every machine without a GPU's libraries, by its first words.
EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
)


@dataclass(frozen=True)
class ToLauncher:
    """What connects a worker with its launcher.

    errors: says what went wrong, even where the disk is full.
    alive: is closed when the launcher is gone; nothing comes through it.
    held: the run folder, which the worker holds too.
    """

    errors: Connection
    alive: Connection
    held: HeldFolder


def work(
    pipeline: Pipeline,
    root: Path,
    name: TaskId,
    made_from: Mapping[str, Any],
    environment: Mapping[str, str],
    log: Path,
    launcher: ToLauncher,
) -> None:
    """The life of a worker process: do one task; what went wrong goes to the log and to the launcher. SIGTERM ends a training
    after its step, with a checkpoint; other work, which has nothing to save, at once.

    Args:
        pipeline: the settings of the launch, whatever the run folder says by now.
    """
    end_with(launcher.alive)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    with lasting_output(may_be_lost=True):
        log_to_stderr("%(asctime)s %(levelname)s %(message)s", level=logging.INFO, force=True)
        try:
            world, process_status, task = discover_world(), ProcessStatus(), build_graph(pipeline)[name]
            saves_steps = kind_of(pipeline.stages[name.stage]).saves_steps
            with (
                process_status.hearing_signals() if saves_steps else contextlib.nullcontext(),
                begun(pipeline, root, task, made_from) if world.is_first else contextlib.nullcontext(),
            ):
                execute(pipeline, root, task, made_from, world, process_status)
        except SpecialmError as error:
            launcher.errors.send(str(error))
            say(f"error: {error}", error=True)
            sys.exit(error.exit_code)


@contextlib.contextmanager
def begun(pipeline: Pipeline, root: Path, task: Task, made_from: Mapping[str, Any]) -> Iterator[None]:
    """Around `execute`, by the first rank: hold the task, and see that it is what was planned.

    Raises:
        MachineError: another process works at it.
        ArtifactError: settings or files have changed since it was planned.
    """
    with hold_task(root, *task.id):
        refuse_other_work(pipeline, root, task, made_from)
        yield


def limit_threads(threads: int) -> None:
    """Tell every numeric library, before it is imported, how many threads this process may use."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # idle threads must not spin on the cores of other tasks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTHONWARNINGS", ",".join(f"ignore:{start}" for start in EXPECTED_WARNINGS))


def ignore_expected_warnings() -> None:
    """As `limit_threads` has it for workers, for a command that imports Megatron-Core into its own process."""
    for start in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=start)


def worker_context(modules: list[str], *, threads: int) -> BaseContext:
    """How workers come into being: forked from a server that has imported `modules`, once.

    Importing torch and Megatron-Core takes five seconds of a core, longer than many a task. A process that forks after it
    has touched a GPU breaks its children, so where there is one, each worker starts afresh.
    """
    limit_threads(threads)
    if Path("/dev/nvidiactl").exists():
        return multiprocessing.get_context("spawn")
    place_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_specialm.run.fork_server", *modules])
    return context


def execute(
    pipeline: Pipeline,
    root: Path,
    task: Task,
    made_from: Mapping[str, Any],
    world: World,
    process_status: ProcessStatus,
) -> None:
    """Do one task and declare it done. Under several ranks every rank calls this; the first one writes.

    Args:
        made_from: what its digest is of; it names the inputs' digests.

    Raises:
        ArtifactError: an input is missing or damaged.
        SpecialmError: what the stage found wrong with its input or the machine, or ranks that do not come.
        Stopped: it was asked to stop.
    """
    process_status.begin(f"working on {task.id}")
    stage = pipeline.stages[task.id.stage]
    together = kind_of(stage).works_together(mpi=world.is_mpi)
    with machine_errors():
        if together:
            meet(world)  # here a signal ends the wait at once
        inputs = {name: artifact_folder(root, *name, made_from["inputs"][str(name)]) for name in task.inputs}
        folder = _begin(root, task, made_from, inputs, world)
        context = Context(pipeline, task, inputs, root, folder, world, pipeline.local.threads, process_status)
        report: Report = importlib.import_module(f"megatron_specialm.stages.{stage.kind}").run(stage, context)
        if world.is_first:
            processes = world.world_size if together else 1
            seconds = report.lost_seconds + context.watch.seconds - report.apart.seconds
            own = _cost(Spent(report.tokens, report.slots, report.flops, seconds), processes)
            apart = _cost(report.apart, processes) if report.apart != Spent() else None
            marker = Marker(
                sha256_json(made_from), own, report.values, _versions(), apart=apart, earlier=report.earlier
            )
            finish_artifact(root, *task.id, marker)


def _cost(spent: Spent, processes: int) -> Cost:
    seconds = spent.seconds
    return Cost(spent.tokens, spent.flops, seconds, seconds * processes, name_of_device(), processes, spent.slots)


def _begin(root: Path, task: Task, made_from: Mapping[str, Any], inputs: Mapping[TaskId, Path], world: World) -> Path:
    """The first rank checks the inputs and makes the folder; the others, who may wait for long, work when it is there."""
    digest = sha256_json(made_from)
    word = f"begun {task.id} {digest}"
    if world.is_first:
        for name, folder in inputs.items():
            check_artifact(folder)
            for part in _parts(root, name, folder):
                check_artifact(part)
        folder = begin_artifact(root, *task.id, digest=digest, made_from=made_from)
        if world.world_size > 1:
            meet(world).set(word, "")
        return folder
    await_word(world, word)
    folder = artifact_folder(root, *task.id, digest)
    deadline = time.monotonic() + SHARED_SECONDS
    while time.monotonic() < deadline:
        if (folder / LABEL).exists() and read_label(folder)["digest"] == digest:
            return folder
        time.sleep(POLL_SECONDS)
    raise ArtifactError(
        f"{folder}: rank {world.rank} does not see what rank 0 has made: "
        "is the run folder on a filesystem that all nodes share?"
    )


def _parts(root: Path, name: TaskId, folder: Path) -> Iterator[Path]:
    """The artifacts whose files a reader of this one opens too: of a set in shards, the shards'."""
    for other, digest in read_label(folder)["made_from"].get("inputs", {}).items():
        stage, _, key = other.partition("/")
        if stage == name.stage:
            yield artifact_folder(root, stage, key, digest)


def _versions() -> dict[str, str]:
    packages = {name: installed_version(name) for name in ("torch", "megatron-core", "transformers", "numpy")}
    ours = {"megatron_specialm": __version__, "python": platform.python_version()}
    return {**ours, **{name: value for name, value in packages.items() if value}}
