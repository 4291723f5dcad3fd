"""The status of a pipeline: finished tasks by their markers, jobs by Slurm and the records, speed by the metrics."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.artifacts import LABEL, artifact_folder, read_marker
from megatron_specialm.base.gpus import dense_peak
from megatron_specialm.base.process_status import Count, read_count
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.config.yaml_file import read_yaml_file
from megatron_specialm.estimate.flops import device_hours
from megatron_specialm.graph.lineage import train_stages
from megatron_specialm.graph.plan import PlannedTask, make_plan
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.report.estimates import stage_flops
from megatron_specialm.report.results import capped_warnings
from megatron_specialm.run.processes import last_line
from megatron_specialm.run.progress import last_record
from megatron_specialm.slurm.records import submission_folder
from megatron_specialm.slurm.state import RUNNING, ElementState, element_states, newest

FAILURES = {"failed", "hang", "bad-node"}  # outcomes of an attempt


@dataclass(frozen=True)
class Training:
    """The state of a running training. `loss`: nats per token, None where it is not finite. `fill`: real tokens over slots, not
    recorded by earlier versions."""

    key: str
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float
    eta_seconds: float
    fill: float | None


@dataclass(frozen=True)
class Failure:
    """An element that ended without finishing its tasks, or was queued again. `error`: one line."""

    tasks: tuple[str, ...]
    job: str
    state: str
    nodes: str
    error: str
    log: str


@dataclass(frozen=True)
class StageStatus:
    """A stage. `elements`: those of jobs for tasks that are not done. `waiting`: the number of other tasks that are not
    submitted, and of those that are stale. `trainings` and `counts`: of running tasks that have reported. Hours are of
    processes, one per GPU; a process on CPU counts as one, too. `planned_hours`: at the utilisation that a plan assumes; None
    where the GPU is not known, or nothing is trained. `warnings`: of finished tasks."""

    stage: str
    tasks: int
    done: int
    elements: tuple[ElementState, ...]
    waiting: Mapping[str, int]
    trainings: tuple[Training, ...]
    counts: tuple[Count, ...]
    device_hours: float
    planned_hours: float | None
    failures: tuple[Failure, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """A pipeline at a moment (Unix time)."""

    pipeline: str
    root: str
    time: float
    stages: tuple[StageStatus, ...]

    @property
    def is_live(self) -> bool:
        """Whether a job is queued or running."""
        return any(element.live for stage in self.stages for element in stage.elements)


def read_status(pipeline: Pipeline) -> Status:
    """Read a config's run folder and Slurm's queue. Slurm is not asked where nothing was submitted.

    Raises:
        ArtifactError: a record in the run folder is damaged.
        MachineError: Slurm does not answer.
    """
    root, now = Path(pipeline.root), time.time()
    plan = make_plan(pipeline, root)
    states = element_states(root)
    peak = _peak(root, states)
    stages = dict.fromkeys(name.stage for name in plan)
    return Status(
        pipeline.name, str(root), now, tuple(_stage(pipeline, stage, plan, states, now, peak) for stage in stages)
    )


def _stage(
    pipeline: Pipeline,
    stage: str,
    plan: Mapping[TaskId, PlannedTask],
    states: Sequence[ElementState],
    now: float,
    peak: float | None,
) -> StageStatus:
    root = Path(pipeline.root)
    tasks = {name: planned for name, planned in plan.items() if name.stage == stage}
    ours = [state for state in states if state.job.stage == stage]
    carriers = newest(ours)
    carried: dict[TaskId, ElementState] = {}
    waiting: dict[str, int] = {}
    for name, planned in tasks.items():
        if planned.state == "done":
            continue
        state, digest = carriers.get(name, (None, ""))
        # An element for another digest is shown while it is live, as it blocks this one.
        if state is not None and (state.live or (digest == planned.digest and state.state != "finished")):
            carried[name] = state
        else:
            word = "not submitted" if planned.state == "to do" else planned.state
            waiting[word] = waiting.get(word, 0) + 1
    elements = tuple(dict.fromkeys(carried.values()))
    seconds = sum(state.job.ranks * state.seconds(root, now) for state in ours)
    seconds += sum(_local_seconds(root, planned) for name, planned in tasks.items() if name not in carriers)
    failures = [
        _failure(root, element, [name.key for name, state in carried.items() if state is element])
        for element in elements
    ]
    trains = stage in train_stages(pipeline)
    wanted = {name: state for name, state in carried.items() if carriers[name][1] == tasks[name].digest}
    running = list(_running(root, tasks, wanted))
    return StageStatus(
        stage=stage,
        tasks=len(tasks),
        done=sum(planned.state == "done" for planned in tasks.values()),
        elements=elements,
        waiting=waiting,
        trainings=tuple(_trainings(running)) if trains else (),
        counts=tuple(count for _, folder in running if (count := read_count(folder)) is not None),
        device_hours=seconds / 3600,
        planned_hours=device_hours(stage_flops(pipeline, stage, plan), peak) if trains and peak else None,
        failures=tuple(failure for failure in failures if failure is not None),
        warnings=tuple(capped_warnings(pipeline, tasks, root)),
    )


def _running(
    root: Path, tasks: Mapping[TaskId, PlannedTask], carried: Mapping[TaskId, ElementState]
) -> Iterator[tuple[str, Path]]:
    """Keys and folders of the tasks that jobs are running."""
    for name, state in carried.items():
        folder = artifact_folder(root, *name, tasks[name].digest)
        if state.state == "running" and (folder / LABEL).exists():
            yield name.key, folder


def _trainings(running: Iterable[tuple[str, Path]]) -> Iterator[Training]:
    for key, folder in running:
        record = last_record(folder / "metrics.jsonl")
        if record is not None:
            yield Training(
                key, record.step, record.steps, record.loss, record.tokens_per_second, record.eta_seconds, record.fill
            )


def _failure(root: Path, element: ElementState, keys: Sequence[str]) -> Failure | None:
    """Why an element ended without finishing its tasks, or was last queued again, unless by a time limit or a preemption."""
    attempts = element.attempts
    if element.live:
        attempts = attempts[:-1] if element.state in RUNNING else attempts
        if not attempts or (attempts[-1].end is not None and attempts[-1].end.outcome not in FAILURES):
            return None
    elif element.state not in ("failed", "lost"):
        return None
    last = attempts[-1] if attempts else None
    end = last.end if last is not None else None
    state = f"{end.outcome if end is not None else 'lost'}, queued again" if element.live else element.state
    nodes = element.nodes if last is None or not element.live else ",".join(last.begin.nodes)
    log = element.log(root)
    error = end.reason if end is not None and end.reason else last_line(log)
    tasks = tuple(f"{element.job.stage}/{key}" for key in keys)
    return Failure(tasks, element.slurm_name, state, nodes, error, str(log))


def _local_seconds(root: Path, planned: PlannedTask) -> float:
    """The cost of a task that no job did, with its work for comparisons."""
    marker = read_marker(artifact_folder(root, *planned.task.id, planned.digest))
    if marker is None:
        return 0.0
    return marker.whole_cost.device_seconds + (marker.apart.device_seconds if marker.apart else 0.0)


def _peak(root: Path, states: Sequence[ElementState]) -> float | None:
    """Peak FLOP/s of the GPUs of the last submission's site, where its profile names them."""
    if not states:
        return None
    profile = submission_folder(root, states[-1].job.submission) / "site.yaml"
    site: Any = read_yaml_file(profile) if profile.exists() else None
    gpu = site.get("gpu") if isinstance(site, dict) else None
    return dense_peak(gpu) if isinstance(gpu, str) else None
