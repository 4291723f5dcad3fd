"""Commands of this project and all their descendants, found by a mark that processes inherit in their environment."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

MARK = "SPECIALM_DISTURBED"
PROJECT = Path(__file__).parents[2]


class Launch:
    """A running command in its working directory. Its output goes to a file."""

    def __init__(self, folder: Path, *arguments: str, output: Path) -> None:
        self.mark, self.arguments, self.output = uuid.uuid4().hex, arguments, output
        self.disturbed_by: list[str] = []
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "COLUMNS": "200", MARK: self.mark}
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_specialm", *arguments],
                cwd=folder, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                preexec_fn=_usual_signals, start_new_session=True,
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()

    @property
    def printed(self) -> str:
        """All output so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> list[psutil.Process]:
        """Its living processes: itself and its descendants, including orphans."""
        return list(_marked(self.mark))

    def fork_server(self) -> psutil.Process | None:
        """The process whose children are the workers, while the command lives."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                if any("forkserver" in word for word in child.cmdline()):
                    return child
        return None

    def workers(self) -> list[psutil.Process]:
        """The processes that do tasks."""
        server = self.fork_server()
        with contextlib.suppress(psutil.Error):
            return server.children() if server else []
        return []

    def signal_all(self, number: signal.Signals) -> None:
        """Signal the processes of its group, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Kill all remaining processes."""
        kill(self.alive())
        self.process.wait()


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes that still exist."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(psutil.Error):
            if process.info["status"] != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                yield process


def _usual_signals() -> None:
    """Restore default signal handlers: a shell or pytest may start processes that ignore signals, as would their children."""
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
