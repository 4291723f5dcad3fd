"""The logs of tasks."""

from pathlib import Path

from megatron_specialm.graph.tasks import TaskId

BYTES_PER_LINE = 400  # long ones may cost a tail some of its lines, never the last


def log_path(root: Path, name: TaskId) -> Path:
    """The log of a task that was run on this machine."""
    return root / "jobs" / f"{name.stage}.{name.key}.log"


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, which may be large; fewer where lines are long, none where there is no log."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - max(65536, lines * BYTES_PER_LINE)))
        return file.read().decode("utf-8", errors="replace").rstrip().split("\n")[-lines:]


def last_line(path: Path) -> str:
    """The last line of a log that is not empty."""
    return next((line.strip() for line in reversed(tail(path, 100)) if line.strip()), "the log is empty")
