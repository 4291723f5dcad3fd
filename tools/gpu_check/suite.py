"""Run `tests/gpu`, one figure per test. If a test kills or hangs its process, it is named and a new process runs the others."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from gpu_check.figures import Figure

ROOT = Path(__file__).parents[2]
TEST_SECONDS = 90.0
POLL_SECONDS = 0.2


def run(*, tiny: bool, tests: Path = ROOT / "tests" / "gpu") -> Iterator[Figure]:
    """All tests marked `gpu`. Without a GPU they are skipped, which shows that they can be found."""
    import pytest  # noqa: F401  (raises here if it is not installed)

    done: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        while True:
            ended_early = yield from _once(tests, done, Path(folder, f"outcomes-{len(done)}"))
            if not ended_early:
                return


def _once(tests: Path, done: list[str], outcomes: Path) -> Generator[Figure, None, bool]:
    """Run pytest once over all tests except those in `done`, which grows. Returns whether it ended early."""
    command = [sys.executable, "-m", "pytest", "-p", "gpu_check.outcomes", "-p", "no:cacheprovider", "-m", "gpu", "-q"]
    command += ["-o", "timeout=0", *(f"--deselect={test}" for test in done), str(tests)]
    environment = {**os.environ, "GPU_CHECK_OUTCOMES": str(outcomes)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr, env=environment)
    running, since, read = "", time.monotonic(), 0
    try:
        while True:
            ended = process.poll() is not None
            lines = outcomes.read_text().splitlines() if outcomes.exists() else []
            for line in lines[read:]:
                event = json.loads(line)
                since = time.monotonic()
                running = event["test"] if event["outcome"] == "started" else ""
                if not running:
                    done.append(event["test"])
                    yield _figure(event["test"], event["outcome"], event["seconds"], event["reason"])
            read = len(lines)
            hangs = bool(running) and time.monotonic() - since > TEST_SECONDS
            if ended or hangs:
                break
            time.sleep(POLL_SECONDS)
    finally:
        process.kill()
        process.wait()
    if not running:
        if process.returncode not in (0, 1, 5):  # all passed, some failed, none is left
            raise RuntimeError(f"pytest ended with {process.returncode}: see gpu_check.log")
        return False
    done.append(running)
    how = f"hung for {TEST_SECONDS:.0f} s" if hangs else f"ended the process ({process.returncode})"
    yield _figure(running, "failed", time.monotonic() - since, how)
    return True


def _figure(test: str, outcome: str, seconds: float, reason: str) -> Figure:
    name = test.partition("::")[2]
    good = {"passed": True, "failed": False}.get(outcome)
    return Figure(name, outcome if not reason else f"{outcome}: {reason}", f"{seconds:.1f} s", good=good)
