"""Run a plan inside the ranks that torchrun, srun or mpirun has started.

Every rank walks the plan in order. All of them train together and, under MPI, cluster together; other stages are the
first rank's work, while the others wait for its marker.
"""

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_specialm.base.artifacts import is_complete
from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import ConfigError, SpecialmError, Stopped, TrainingError, machine_errors
from megatron_specialm.base.files import sha256_json
from megatron_specialm.base.heartbeat import heartbeat
from megatron_specialm.base.lifeline import Lifeline
from megatron_specialm.base.outcome import recorded_outcome
from megatron_specialm.base.rendezvous import is_alive, meet
from megatron_specialm.config.graph import Task, TaskId, build_graph
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.launch.plan import PlannedTask, show
from megatron_specialm.launch.reuse import take_over
from megatron_specialm.launch.worker import execute, ignore_expected_warnings, limit_threads, works_together

POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0  # for the last marker of a first rank that has ended to be seen, on a filesystem that caches


def fit_to_world(pipeline: Pipeline, world: World, *, stages: Collection[str]) -> Pipeline:
    """Train stages that are to run, spread over all ranks: as many data-parallel copies of each one's layout as there are
    ranks for.

    Raises:
        ConfigError: the ranks are no multiple of a stage's tensor x pipeline x context parallel processes, or more than its
            batch divides into.
    """
    fitted = dict(pipeline.stages)
    for name in stages:
        stage = fitted[name]
        if not isinstance(stage, TrainStage):
            continue
        copy = stage.parallel.world_size // stage.parallel.data_parallel
        if world.world_size % copy:
            raise ConfigError(
                f"stages.{name}.parallel: {world.world_size} ranks ({world.launcher}) are no multiple of "
                f"tensor_parallel {stage.parallel.tensor_parallel} x pipeline_parallel "
                f"{stage.parallel.pipeline_parallel} x context_parallel {stage.parallel.context_parallel} = {copy}: "
                f"start {max(1, world.world_size // copy) * copy} ranks, or change the layout"
            )
        parallel = stage.parallel.model_copy(update={"data_parallel": world.world_size // copy})
        fitted[name] = stage.model_copy(update={"parallel": parallel})
    pipeline = pipeline.model_copy(update={"stages": fitted})
    build_graph(pipeline)  # refuses what a layout cannot do
    return pipeline


@contextlib.contextmanager
def attended(world: World) -> Iterator[Lifeline]:
    """The life of a rank that a launcher has started: it says where it stands, stops when it is asked to, and leaves its
    outcome. A process that nobody has launched, and no supervisor waits for, needs none of it."""
    lifeline = Lifeline()
    if world.launcher == "none" and "SPECIALM_ATTEMPT" not in os.environ:
        yield lifeline
        return
    with (
        ending_together(world),
        lifeline.hearing_signals(),
        recorded_outcome(world, lifeline),
        machine_errors(),
        heartbeat(lifeline, world),
    ):
        yield lifeline


def run_inline(
    pipeline: Pipeline, plan: Mapping[TaskId, PlannedTask], root: Path, world: World, lifeline: Lifeline
) -> None:
    """Take over what a plan finds in other run folders, which is the first rank's work, and do what it still lacks, in this
    process and with the other ranks.

    Raises:
        Stopped: this process was asked to stop.
    """
    limit_threads(pipeline.local.threads)
    ignore_expected_warnings()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    if world.is_first:  # as in a worker's log, less what Megatron-Core says
        logging.getLogger("megatron_specialm").setLevel(logging.INFO)
    elsewhere = _found_elsewhere(plan, world) if pipeline.reuse else frozenset()
    if world.is_first:
        show(plan, root)
    for planned in plan.values():
        if planned.state == "done":
            continue
        if str(planned.task.id) not in elsewhere:
            do_together(pipeline, root, planned.task, planned.made_from, world, lifeline)
        else:
            lifeline.begin(f"taking over {planned.task.id}")
            if world.is_first:
                take_over({planned.task.id: planned}, root)
            _await_marker(root, planned.task.id, planned.digest, world, lifeline)


def _found_elsewhere(plan: Mapping[TaskId, PlannedTask], world: World) -> frozenset[str]:
    """The tasks that the first rank has found in other run folders, which may change before the others look."""
    store = meet(world)
    if world.is_first:
        found = [str(planned.task.id) for planned in plan.values() if planned.there is not None]
        store.set("found elsewhere", json.dumps(found))
    return frozenset(json.loads(store.get("found elsewhere")))


def do_together(
    pipeline: Pipeline, root: Path, task: Task, made_from: Mapping[str, Any], world: World, lifeline: Lifeline
) -> None:
    """Do one task; every rank calls this, and none goes on before it is done.

    Raises:
        Stopped: this process was asked to stop.
        MachineError: not all ranks have come.
        TrainingError: the first rank has ended without finishing the task.
    """
    lifeline.stop_if_asked()
    meet(world)
    if world.is_first or works_together(pipeline.stages[task.id.stage], world):
        execute(pipeline, root, task, made_from, world, lifeline)
    _await_marker(root, task.id, sha256_json(made_from), world, lifeline)


def _await_marker(root: Path, name: TaskId, digest: str, world: World, lifeline: Lifeline) -> None:
    """Wait until a task is done: the first rank's marker frees the others."""
    lifeline.begin(f"waiting for {name}")
    last_alive = time.monotonic()
    while not is_complete(root, *name, digest=digest):
        if is_alive(world):
            last_alive = time.monotonic()
        elif time.monotonic() - last_alive > GRACE_SECONDS:
            raise TrainingError(f"{name}: rank 0, whose work it is, has ended without finishing it; see what it said")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def ending_together(world: World) -> Iterator[None]:
    """Have an error on one rank end all. torchrun and srun see to that; an MPI rank would wait at its end for the others,
    which wait for what it was to make."""
    try:
        yield
    except Stopped:  # all of them are
        raise
    except Exception as error:
        if not world.is_mpi:
            raise
        from mpi4py import MPI

        message = f"error: {error}" if isinstance(error, SpecialmError) else traceback.format_exc()
        print(message, file=sys.stderr, flush=True)
        MPI.COMM_WORLD.Abort(error.exit_code if isinstance(error, SpecialmError) else 1)
