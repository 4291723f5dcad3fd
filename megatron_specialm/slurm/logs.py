"""The newest logs of a stage, of Slurm jobs or of runs on this machine, and following them."""

import contextlib
import os
import time
from pathlib import Path

from megatron_specialm.base.errors import ArtifactError, ConfigError
from megatron_specialm.base.output import nobody_reads
from megatron_specialm.base.printing import say
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.graph.build import build_graph
from megatron_specialm.graph.tasks import TaskId
from megatron_specialm.run.processes import log_path as local_log_path
from megatron_specialm.slurm.records import log_path, read_registry

POLL_SECONDS = 0.5


def newest_logs(pipeline: Pipeline, stage: str, only: str | None) -> list[Path]:
    """The log of each task of a stage, or of one of its tasks: of a job or of a run on this machine, whichever is newer. Tasks
    that share a job share its log. The newest log is the last one.

    Raises:
        ConfigError: there is no such stage, or no such task of it.
        ArtifactError: there is no log of it yet.
    """
    root = Path(pipeline.root)
    keys = _keys(pipeline, stage, only)
    candidates = {key: [local_log_path(root, TaskId(stage, key))] for key in keys}
    for job in read_registry(root):
        for number, element in enumerate(job.elements if job.stage == stage else ()):
            for task in element:
                if task.key in candidates:
                    candidates[task.key].append(log_path(root, job.submission, job.name, number))
    written = [[path for path in paths if path.exists()] for paths in candidates.values()]
    found = {max(paths, key=_written) for paths in written if paths}
    if not found:
        raise ArtifactError(f"{root}: {stage}{f'/{only}' if only else ''} has no log yet: it has never run here")
    return sorted(found, key=_written)


def follow(path: Path) -> None:
    """Print what is appended to a log from now on, until Ctrl-C or until the reader of the output has gone."""
    with contextlib.suppress(KeyboardInterrupt), path.open(encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        while not nobody_reads():
            say(file.read(), end="")
            time.sleep(POLL_SECONDS)


def _keys(pipeline: Pipeline, stage: str, key: str | None) -> list[str]:
    if stage not in pipeline.stages:
        raise ConfigError(f"no stage {stage!r}; there are {', '.join(pipeline.stages)}")
    keys = [name.key for name in build_graph(pipeline) if name.stage == stage]
    if key is not None and key not in keys:
        raise ConfigError(f"{stage} has no task {key!r}; it has {', '.join(keys)}")
    return keys if key is None else [key]


def _written(path: Path) -> float:
    return path.stat().st_mtime
