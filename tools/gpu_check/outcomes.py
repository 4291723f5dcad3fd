"""A pytest plugin: which test has started and how each ended, a line of JSON each, into the file GPU_CHECK_OUTCOMES."""

import json
import os
import sys

import pytest
import torch


def _tell(test: str, outcome: str, seconds: float = 0.0, reason: str = "") -> None:
    with open(os.environ["GPU_CHECK_OUTCOMES"], "a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "seconds": seconds, "reason": reason}) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Before a test's setup."""
    _tell(nodeid, "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After each of setup, call and teardown: one of them has the test's outcome."""
    if report.when == "call" or report.outcome != "passed":
        _tell(report.nodeid, report.outcome, report.duration, _reason(report))


def pytest_runtest_logfinish(nodeid: str) -> None:
    """End the process if a failed kernel has left the device unusable: the other tests need a new process."""
    sys.last_traceback = sys.last_value = None  # these keep the frames of a failed test and their tensors
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{nodeid}: the device is unusable: {error}", file=sys.stderr, flush=True)
            os._exit(1)


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")[:100]
    crash = getattr(report.longrepr, "reprcrash", None)
    return "" if crash is None else crash.message.partition("\n")[0][:100]
