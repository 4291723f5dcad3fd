"""The plan: the digest of each task of a pipeline, and whether its artifact is there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_specialm.base.artifacts import (
    ARTIFACTS,
    artifact_folder,
    artifact_link,
    is_complete,
    link_artifact,
    read_marker,
)
from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.base.files import sha256_json, write_text
from megatron_specialm.base.integrity import LEFT_OVER, find_damage
from megatron_specialm.config.load import dump_pipeline, read_config
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.digests import digest_content
from megatron_specialm.graph.earlier_layout import refuse_earlier_layout
from megatron_specialm.graph.file_hashes import CACHE, hash_files, with_made_by_hint
from megatron_specialm.graph.tasks import Task, TaskId, ancestors

RESOLVED = "pipeline.yaml"  # the resolved config in a run folder
# Entries that may be in a new run folder before the config is written there.
OWN_ENTRIES = (ARTIFACTS, "jobs", "parity", CACHE, ".lock", ".locks")
State = Literal["done", "done elsewhere", "stale", "damaged", "to do"]


@dataclass(frozen=True)
class PlannedTask:
    """A task with the digest of its artifact, the content of that digest, and its state. `stale`: finished from other settings,
    text or inputs. `damaged`: finished, but a file is missing or has another size. `done elsewhere`: complete in `elsewhere`, a
    run folder that the config names in `reuse`."""

    task: Task
    digest: str
    state: State
    made_from: Mapping[str, Any]
    elsewhere: Path | None = None

    @property
    def is_to_do(self) -> bool:
        """Whether the task must run: it is neither done here nor in a folder to reuse."""
        return self.state in ("stale", "damaged", "to do")


Plan = Mapping[TaskId, PlannedTask]


def make_plan(pipeline: Pipeline, root: Path, *, keep_hashes: bool = True) -> dict[TaskId, PlannedTask]:
    """All tasks in the graph's order. Reads the content of the text; writes only the cache of its hashes.

    Args:
        keep_hashes: False to write nothing.

    Raises:
        ConfigError: the stages do not go together (`build_graph`).
        DataError: text that a task needs is missing.
    """
    graph = build_graph(pipeline)
    refuse_earlier_layout(root)
    with with_made_by_hint(pipeline.text):
        hashes = hash_files(graph.values(), root, keep=keep_hashes)
    others = [Path(folder) for folder in pipeline.reuse if Path(folder).resolve() != root.resolve()]
    plan: dict[TaskId, PlannedTask] = {}
    for task in graph.values():
        inputs = {name: plan[name].digest for name in task.inputs}
        wanted = digest_content(pipeline, task, inputs=inputs, file_hashes=hashes[task.id])
        plan[task.id] = _planned(task, wanted, root, others)
    return plan


def select_tasks(
    plan: Mapping[TaskId, PlannedTask],
    *,
    only: str | None,
    until: str | None,
    keys: Sequence[str] | None = None,
    check_inputs: bool = True,
) -> dict[TaskId, PlannedTask]:
    """The part of a plan that a run does: one stage (`only`) or some of its tasks (`keys`), or a stage and all that it
    depends on (`until`); default: everything. Artifacts that one stage needs and that are done elsewhere are included.

    Args:
        check_inputs: with `only`, check that the inputs of the stage are done.

    Raises:
        ConfigError: there is no such stage, or it has no task with such a key.
        ArtifactError: with `only`, an input is stale or missing.
    """
    for stage in (only, until):
        if stage is not None and stage not in {task_id.stage for task_id in plan}:
            raise ConfigError(f"no stage {stage!r}; there are {', '.join(dict.fromkeys(name.stage for name in plan))}")
    if keys is not None and only is None:
        raise ConfigError(f"--keys {','.join(keys)}: they are of one stage's tasks: name it with --only")
    graph = {name: planned.task for name, planned in plan.items()}
    if only is not None:
        chosen = {name: planned for name, planned in plan.items() if name.stage == only}
        chosen = _of_keys(chosen, only, keys) if keys is not None else chosen
        if check_inputs:
            _check_inputs(plan, chosen)
        needed = ancestors(graph, *chosen)
        return {name: plan[name] for name in needed if name in chosen or plan[name].elsewhere is not None}
    if until is None:
        return dict(plan)
    return {name: plan[name] for name in ancestors(graph, *(name for name in plan if name.stage == until))}


def _of_keys(tasks: Mapping[TaskId, PlannedTask], stage: str, keys: Sequence[str]) -> dict[TaskId, PlannedTask]:
    for key in keys:
        if TaskId(stage, key) not in tasks:
            raise ConfigError(f"--keys: {stage} has no task {key!r}; it has {', '.join(name.key for name in tasks)}")
    # Shards of a set, trials of a training.
    parts = {part for key in keys for part in tasks[TaskId(stage, key)].task.inputs}
    return {name: planned for name, planned in tasks.items() if name.key in keys or name in parts}


def _check_inputs(plan: Mapping[TaskId, PlannedTask], chosen: Mapping[TaskId, PlannedTask]) -> None:
    for name, planned in chosen.items():
        for needed in planned.task.inputs if planned.is_to_do else ():
            if plan[needed].is_to_do and needed not in chosen:
                raise ArtifactError(
                    f"{name} reads {needed}, which is {plan[needed].state}: run that first, or --until {name.stage}"
                )


def refuse_other_work(pipeline: Pipeline, root: Path, task: Task, made_from: Mapping[str, Any]) -> None:
    """Check before a task begins that settings and files have not changed since it was planned.

    Args:
        made_from: the content of its digest when it was planned, which has the digests of its inputs.

    Raises:
        ArtifactError: they have changed; the message has both digests.
        DataError: a file is missing.
    """
    with with_made_by_hint(pipeline.text):
        hashes = hash_files([task], root)[task.id]
    inputs = {name: made_from["inputs"].get(str(name), "") for name in task.inputs}
    now = digest_content(pipeline, task, inputs=inputs, file_hashes=hashes)
    if changed := [part for part in now if sha256_json(now[part]) != sha256_json(made_from.get(part))]:
        raise ArtifactError(
            f"{task.id}: was planned as {sha256_json(made_from)[:16]} and would be made as {sha256_json(now)[:16]}: its "
            f"{' and '.join(changed)} changed in between: run or submit the same again, which plans anew"
        )


def refuse_foreign_folder(pipeline: Pipeline, root: Path) -> None:
    """Check before anything is written to a run folder that it is new or belongs to this pipeline.

    Raises:
        ConfigError: it belongs to a pipeline of another name, or has files but no run.
    """
    path = root / RESOLVED
    if path.exists():
        name = read_config(path).get("name")
        if name != pipeline.name:
            raise ConfigError(
                f"root: {root} holds the run of pipeline {name!r}, and this config is {pipeline.name!r}: choose another root"
            )
    elif foreign := sorted(
        entry.name for entry in root.glob("*") if entry.name not in OWN_ENTRIES and not LEFT_OVER.fullmatch(entry.name)
    ):
        raise ConfigError(
            f"root: {root} holds files and no run ({', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}): "
            "choose an empty or a new folder"
        )


def write_resolved(pipeline: Pipeline, root: Path) -> None:
    """Write the resolved config into the run folder, as a record: tasks use the settings that they were started with. The
    caller holds the lock of the folder.

    Raises:
        ConfigError: as `refuse_foreign_folder`.
    """
    refuse_foreign_folder(pipeline, root)
    write_text(root / RESOLVED, dump_pipeline(pipeline))


def _planned(task: Task, made_from: Mapping[str, Any], root: Path, others: Sequence[Path]) -> PlannedTask:
    """The task's state, by its digest. It is stale where no artifact of this digest is complete, here or in `others`, but the
    link STAGE/KEY leads to a complete one: that was made from other settings, text or inputs (`digest_content`)."""
    digest = sha256_json(made_from)
    folder = artifact_folder(root, *task.id, digest)
    marker = read_marker(folder)
    if marker is not None and find_damage(folder, marker.files) is None:
        return PlannedTask(task, digest, "done", made_from)
    for there in others:
        if is_complete(there, *task.id, digest=digest):
            return PlannedTask(task, digest, "done elsewhere", made_from, there)
    if marker is not None:
        return PlannedTask(task, digest, "damaged", made_from)
    return PlannedTask(task, digest, "stale" if read_marker(artifact_link(root, *task.id)) else "to do", made_from)


def damage_in(plan: Mapping[TaskId, PlannedTask], root: Path) -> Iterator[str]:
    """For each damaged task, what is wrong with its files."""
    for name, planned in plan.items():
        folder = artifact_folder(root, *name, planned.digest)
        if planned.state == "damaged" and (marker := read_marker(folder)) is not None:
            yield f"{name} is damaged: {find_damage(folder, marker.files)}"


def link_artifacts(plan: Mapping[TaskId, PlannedTask], root: Path) -> None:
    """Point the links `STAGE/KEY` of a run folder to the artifacts that are done; settings may have gone back to those of an
    earlier one. The caller holds the lock of the folder.

    Raises:
        ArtifactError: a link's place is taken by something else.
    """
    for name, planned in plan.items():
        if planned.state == "done":
            link_artifact(root, *name, planned.digest)
