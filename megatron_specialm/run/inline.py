"""Run a plan inside the ranks that torchrun, srun or mpirun has started.

After the rendezvous, rank 0, which holds the run folder, plans and checks the plan, however long that takes, and broadcasts it.
Then every rank does the plan's tasks in order. Trainings, and under MPI clusterings, are done by all ranks together; other
tasks by rank 0, while the others wait for the marker.
"""

import contextlib
import json
import logging
import os
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_specialm.base.artifacts import SHOWN_DIGITS, is_complete
from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import ConfigError, SpecialmError, Stopped, TrainingError, machine_errors
from megatron_specialm.base.printing import log_to_stderr, say
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.protocol import ATTEMPT
from megatron_specialm.base.rendezvous import is_alive, rendezvous, wait_for_key
from megatron_specialm.base.reporting import heartbeat, recorded_outcome
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.lineage import train_stages
from megatron_specialm.graph.plan import PlannedTask, State, link_artifacts, make_plan
from megatron_specialm.graph.stage_kind import kind_of
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.preflight import refuse_what_the_machine_lacks
from megatron_specialm.run.processes import ignore_expected_warnings, limit_threads
from megatron_specialm.run.reuse import take_over
from megatron_specialm.run.worker import execute

PLANNED = "planned"  # a key of the ranks' store
POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0  # until the last marker of a rank 0 that has ended is visible, on a filesystem that caches


def fit_to_world(pipeline: Pipeline, world: World, *, stages: Collection[str]) -> Pipeline:
    """Train stages that are to run, spread over all ranks: as many data-parallel copies of each one's layout as there are
    ranks for.

    Raises:
        ConfigError: the ranks are no multiple of a stage's tensor x pipeline x context parallel processes, or more than its
            batch divides into.
    """
    fitted: dict[str, Any] = dict(pipeline.stages)
    for name, stage in train_stages(pipeline).items():
        if name not in stages:
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


def fit_to_ranks(pipeline: Pipeline, plan: Mapping[TaskId, PlannedTask], world: World) -> Pipeline:
    """The config, fitted to the number of ranks; each rank checks its own machine.

    Raises:
        ConfigError: as of `fit_to_world`.
        MachineError: the machine lacks what a stage that is to run needs.
    """
    alone = world.launcher == "none"
    if not alone:
        stages = {name.stage for name, planned in plan.items() if planned.state != "done"}
        pipeline = fit_to_world(pipeline, world, stages=stages)
    to_do = {name.stage for name, planned in plan.items() if planned.is_to_do}
    refuse_what_the_machine_lacks(pipeline, stages=to_do, alone=alone)
    return pipeline


@contextlib.contextmanager
def rank_lifecycle(world: World) -> Iterator[ProcessStatus]:
    """Within, this process is a rank: it sends heartbeats, stops on request, and leaves its outcome. A process without a
    launcher and a supervisor does none of that."""
    process_status = ProcessStatus()
    if world.launcher == "none" and ATTEMPT not in os.environ:
        yield process_status
        return
    with (
        abort_mpi_on_error(world),
        process_status.stop_on_signals(),
        recorded_outcome(world, process_status),
        machine_errors(),
        heartbeat(process_status, world),
    ):
        yield process_status


def join_ranks(pipeline: Pipeline, world: World, process_status: ProcessStatus) -> None:
    """The rendezvous, before a rank reads the run folder.

    Raises:
        MachineError: not all ranks have arrived.
    """
    limit_threads(pipeline.local.threads)
    ignore_expected_warnings()
    log_to_stderr("%(asctime)s %(levelname)s %(message)s")
    if world.is_first:  # as in a worker's log, without the lines of Megatron-Core
        logging.getLogger("megatron_specialm").setLevel(logging.INFO)
    rendezvous(world)
    process_status.begin("planning" if world.is_first else "waiting for the plan of rank 0")


def lead(plan: Mapping[TaskId, PlannedTask], world: World) -> None:
    """Broadcast the plan, with the state of each task, from rank 0 to the others."""
    found = {str(name): [planned.state, planned.digest] for name, planned in plan.items()}
    rendezvous(world).set(PLANNED, json.dumps(found))


def follow(
    pipeline: Pipeline, root: Path, world: World, process_status: ProcessStatus
) -> tuple[Pipeline, dict[TaskId, PlannedTask]]:
    """The config and the plan of another rank than 0, by the broadcast plan.

    Raises:
        ConfigError: this rank's plan has other digests.
        MachineError: not all ranks have arrived, or this one's machine cannot do it.
        TrainingError: rank 0 has ended before it planned.
    """
    join_ranks(pipeline, world, process_status)
    found = json.loads(wait_for_key(world, PLANNED))
    plan = _as_found(make_plan(pipeline, root, keep_hashes=False), found, world)
    return fit_to_ranks(pipeline, plan, world), plan


def _as_found(
    plan: Mapping[TaskId, PlannedTask], found: Mapping[str, tuple[State, str]], world: World
) -> dict[TaskId, PlannedTask]:
    """The tasks of a plan that rank 0 has chosen, in the states that it found: more tasks may have been done since."""
    own = {str(name): planned for name, planned in plan.items()}
    for name, (_, digest) in found.items():
        here = own[name].digest[:SHOWN_DIGITS] if name in own else "nothing"
        if here != digest[:SHOWN_DIGITS]:
            raise ConfigError(
                f"{name}: rank {world.rank} would make it as {here}, rank 0 as {digest[:SHOWN_DIGITS]}: give all ranks the "
                "same config and text"
            )
    return {own[name].task.id: replace(own[name], state=state) for name, (state, _) in found.items()}


def run_inline(
    pipeline: Pipeline, plan: Mapping[TaskId, PlannedTask], root: Path, world: World, process_status: ProcessStatus
) -> None:
    """Take over artifacts of other run folders, on rank 0, and do the missing tasks with the other ranks.

    Args:
        plan: that of rank 0.

    Raises:
        Stopped: this process was asked to stop.
    """
    if world.is_first:
        link_artifacts(plan, root)
    for planned in plan.values():
        if planned.state == "done":
            continue
        if planned.state != "done elsewhere":
            run_task(pipeline, root, planned, world, process_status)
        else:
            process_status.begin(f"taking over {planned.task.id}")
            if world.is_first:
                take_over({planned.task.id: planned}, root)
            _await_marker(root, planned, world, process_status)


def run_task(pipeline: Pipeline, root: Path, planned: PlannedTask, world: World, process_status: ProcessStatus) -> None:
    """Do one task. Every rank calls this, and none returns before the task is done.

    Raises:
        Stopped: this process was asked to stop.
        MachineError: not all ranks have arrived, or another process works at the task.
        TrainingError: rank 0 has ended without finishing the task.
    """
    process_status.stop_if_asked()
    rendezvous(world)
    if world.is_first or kind_of(pipeline.stages[planned.task.id.stage]).works_together(mpi=world.is_mpi):
        execute(pipeline, root, planned, world, process_status)
    _await_marker(root, planned, world, process_status)


def _await_marker(root: Path, planned: PlannedTask, world: World, process_status: ProcessStatus) -> None:
    """Wait for the marker of a task."""
    name = planned.task.id
    process_status.begin(f"waiting for {name}")
    last_alive = time.monotonic()
    while not is_complete(root, *name, digest=planned.digest):
        if is_alive(world):
            last_alive = time.monotonic()
        elif time.monotonic() - last_alive > GRACE_SECONDS:
            raise TrainingError(f"{name}: rank 0, whose work it is, has ended without finishing it; see its log")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def abort_mpi_on_error(world: World) -> Iterator[None]:
    """End all ranks of MPI when one fails. torchrun and srun do that; an MPI rank would wait at its exit for the others, which
    wait for its result."""
    try:
        yield
    except Stopped:  # all of them are
        raise
    except Exception as error:
        if not world.is_mpi:
            raise
        from mpi4py import MPI

        message = f"error: {error}" if isinstance(error, SpecialmError) else traceback.format_exc()
        say(message, error=True)
        MPI.COMM_WORLD.Abort(error.exit_code if isinstance(error, SpecialmError) else 1)
