"""Take a run folder's jobs out of Slurm's queue."""

from pathlib import Path

from megatron_specialm.base.lock import hold_folder
from megatron_specialm.slurm.queue import cancel_jobs
from megatron_specialm.slurm.records import JobRecord, registry_path
from megatron_specialm.slurm.state import element_states


def cancel(root: Path, stage: str | None) -> list[tuple[JobRecord, int]]:
    """Cancel the jobs that are queued or running, of one stage or all. They save what they can, and are not queued again.

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
    return list(reversed(alive.values()))
