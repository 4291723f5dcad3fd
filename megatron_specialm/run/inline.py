"""Run a plan inside the ranks that torchrun, srun or mpirun has started.

The ranks meet. The first one, which holds the run folder, plans and judges, however long that takes, and says what it has
planned; the others go by that. Then every rank walks the plan in order. All of them train together and, under MPI, cluster
together; other stages are the first rank's work, while the others wait for its marker.
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
from megatron_specialm.base.files import sha256_json
from megatron_specialm.base.printing import log_to_stderr, say
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.rendezvous import is_alive, rendezvous, wait_for_key
from megatron_specialm.base.reporting import heartbeat, recorded_outcome
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.training import TrainStage
from megatron_specialm.graph.plan import PlannedTask, State, make_plan, show
from megatron_specialm.graph.tasks import Task, TaskId, build_graph
from megatron_specialm.run.preflight import refuse_what_the_machine_lacks
from megatron_specialm.run.processes import ignore_expected_warnings, limit_threads
from megatron_specialm.run.reuse import take_over
from megatron_specialm.run.worker import begun, execute, works_together

PLANNED = "planned"  # a key of the ranks' store
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


def fit_to_ranks(pipeline: Pipeline, plan: Mapping[TaskId, PlannedTask], world: World) -> Pipeline:
    """The config for the ranks that there are, each of which looks at its own machine.

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
    """The life of a rank that a launcher has started: it says where it stands, stops when it is asked to, and leaves its
    outcome. A process that nobody has launched, and no supervisor waits for, needs none of it."""
    process_status = ProcessStatus()
    if world.launcher == "none" and "SPECIALM_ATTEMPT" not in os.environ:
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
    """Before a rank looks at the run folder: meet the others.

    Raises:
        MachineError: not all of them have come.
    """
    limit_threads(pipeline.local.threads)
    ignore_expected_warnings()
    log_to_stderr("%(asctime)s %(levelname)s %(message)s")
    if world.is_first:  # as in a worker's log, less what Megatron-Core says
        logging.getLogger("megatron_specialm").setLevel(logging.INFO)
    rendezvous(world)
    process_status.begin("planning" if world.is_first else "waiting for the plan of rank 0")


def lead(plan: Mapping[TaskId, PlannedTask], world: World) -> None:
    """Tell the other ranks, as the first one, what is planned and how it was found."""
    found = {str(name): [planned.state, planned.digest] for name, planned in plan.items()}
    rendezvous(world).set(PLANNED, json.dumps(found))


def follow(
    pipeline: Pipeline, root: Path, world: World, process_status: ProcessStatus
) -> tuple[Pipeline, dict[TaskId, PlannedTask]]:
    """The config and the plan of a rank beside the first one, which has said what it has planned.

    Raises:
        ConfigError: this rank would make something else of it.
        MachineError: not all ranks have come, or this one's machine cannot do it.
        TrainingError: the first rank has ended instead.
    """
    join_ranks(pipeline, world, process_status)
    found = json.loads(wait_for_key(world, PLANNED))
    plan = _as_found(make_plan(pipeline, root, keep_hashes=False), found, world)
    return fit_to_ranks(pipeline, plan, world), plan


def _as_found(
    plan: Mapping[TaskId, PlannedTask], found: Mapping[str, tuple[State, str]], world: World
) -> dict[TaskId, PlannedTask]:
    """The part of a plan that the first rank has chosen, in the states in which it found it: it holds the folder, and what is
    done may have changed since."""
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
    """Take over what a plan finds in other run folders, which is the first rank's work, and do what it still lacks, in this
    process and with the other ranks.

    Args:
        plan: as the first rank found it.

    Raises:
        Stopped: this process was asked to stop.
    """
    if world.is_first:
        show(plan, root)
    for planned in plan.values():
        if planned.state == "done":
            continue
        if planned.state != "done elsewhere":
            run_task(pipeline, root, planned.task, planned.made_from, world, process_status)
        else:
            process_status.begin(f"taking over {planned.task.id}")
            if world.is_first:
                take_over({planned.task.id: planned}, root)
            _await_marker(root, planned.task.id, planned.digest, world, process_status)


def run_task(
    pipeline: Pipeline,
    root: Path,
    task: Task,
    made_from: Mapping[str, Any],
    world: World,
    process_status: ProcessStatus,
) -> None:
    """Do one task; every rank calls this, and none goes on before it is done.

    Raises:
        Stopped: this process was asked to stop.
        MachineError: not all ranks have come, or another process works at the task.
        TrainingError: the first rank has ended without finishing the task.
    """
    process_status.stop_if_asked()
    rendezvous(world)
    if world.is_first or works_together(pipeline.stages[task.id.stage], world):
        with begun(pipeline, root, task, made_from) if world.is_first else contextlib.nullcontext():
            execute(pipeline, root, task, made_from, world, process_status)
    _await_marker(root, task.id, sha256_json(made_from), world, process_status)


def _await_marker(root: Path, name: TaskId, digest: str, world: World, process_status: ProcessStatus) -> None:
    """Wait until a task is done: the first rank's marker frees the others."""
    process_status.begin(f"waiting for {name}")
    last_alive = time.monotonic()
    while not is_complete(root, *name, digest=digest):
        if is_alive(world):
            last_alive = time.monotonic()
        elif time.monotonic() - last_alive > GRACE_SECONDS:
            raise TrainingError(f"{name}: rank 0, whose work it is, has ended without finishing it; see what it said")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def abort_mpi_on_error(world: World) -> Iterator[None]:
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
        say(message, error=True)
        MPI.COMM_WORLD.Abort(error.exit_code if isinstance(error, SpecialmError) else 1)
