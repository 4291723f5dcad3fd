"""Take a run folder's jobs out of Slurm's queue."""

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_specialm.base.lock import hold_folder
from megatron_specialm.slurm.queue import cancel_jobs, live_elements
from megatron_specialm.slurm.records import JobRecord, registry_path
from megatron_specialm.slurm.state import element_states

WAIT_SECONDS = 60  # Slurm's KillWait is half of that by default


def cancel(root: Path, stage: str | None) -> list[tuple[JobRecord, int]]:
    """Cancel the jobs that are queued or running, of one stage or all. They save what they can, and are not queued again.

    It waits, for a minute at most, until they are gone: a submit that comes sooner would take them for jobs at work.

    Returns:
        Each cancelled job with how many of its elements were alive, those that read others' work first.

    Raises:
        MachineError: Slurm does not answer, or another command is at work in the run folder.
    """
    if not registry_path(root).exists():
        return []
    with hold_folder(root):
        alive: dict[str, tuple[JobRecord, int]] = {}
        for state in element_states(root):
            if state.live and stage in (None, state.job.stage):
                _, count = alive.get(str(state.job.slurm_id), (state.job, 0))
                alive[str(state.job.slurm_id)] = state.job, count + 1
        if alive:
            cancel_jobs(reversed(alive))
            _wait_for_end(list(alive))
    return list(reversed(alive.values()))


def _wait_for_end(slurm_ids: Sequence[str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while live_elements(slurm_ids) and time.monotonic() < deadline:
        time.sleep(0.5)
