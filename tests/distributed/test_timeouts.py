"""A process that hangs is noticed by the others within the time that a collective may take."""

import os
import signal
import time
from pathlib import Path

from tests.training import read_metrics, start_ranks


def test_after_the_first_step_collectives_wait_for_less_long(tmp_path: Path) -> None:
    """By the 600 seconds of the first step, the other process would not have ended by the end of this test."""
    ranks = start_ranks(
        tmp_path, steps=100_000, parallel={"data_parallel": 2}, runtime={"collective_timeout_seconds": 5},
        checkpoint={"every": 100_000},
    )  # fmt: skip
    first, second = ranks.processes
    while not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path)) < 4:
        assert first.exitcode is None, (tmp_path / "log-0").read_text()
        time.sleep(0.05)
    assert second.pid is not None
    os.kill(second.pid, signal.SIGSTOP)
    first.join(120)
    code = first.exitcode
    ranks.join(0)
    assert code == 1 and "has died or does not answer" in (tmp_path / "log-0").read_text()
