"""Child processes that may crash or hang, with time limits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from megatron_specialm.base.errors import MachineError
from megatron_specialm.doctor.finding import one_line

COMMAND_SECONDS = 5.0
MODULE_SECONDS = 180.0  # importing torch from a network filesystem, or on a busy node, may take a minute


@dataclass(frozen=True)
class Outcome:
    """How a process ended. `error` is empty if it succeeded, otherwise the reason in one line."""

    output: str
    error: str = ""

    def text(self) -> str:
        """The output.

        Raises:
            MachineError: it failed.
        """
        if self.error:
            raise MachineError(self.error)
        return self.output.strip()

    def answer(self) -> Any:
        """The value that a module sent by `send_answer`.

        Raises:
            MachineError: it failed, was killed, timed out, or sent no answer.
        """
        try:
            return json.loads(self.text())
        except json.JSONDecodeError:
            raise MachineError("its process ended without an answer") from None


class Process:
    """A started command, without a shell or input; leaving the context kills it and its children.

    Output goes to files, in memory if the system supports that. So a command with much output does not block, the reader does
    not wait for children of the command, and a full disk does not matter.
    """

    def __init__(self, arguments: Sequence[str], *, environment: Mapping[str, str], seconds: float) -> None:
        self._output, self._errors = _memory_file(), _memory_file()
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._failure = ""
        self._popen: subprocess.Popen | None = None
        try:
            self._popen = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._errors,
                env=dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            self._failure = f"{arguments[0]} cannot be started: {error.strerror}"

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.close()
        self._errors.close()

    def status(self) -> int | None:
        """The exit status; None while it runs. At its time limit it is killed."""
        if self._popen is None:
            return 1
        if self._popen.poll() is None and time.monotonic() >= self._deadline:
            self.kill()
            self._failure = f"no answer within {self._seconds:g} s"
        return self._popen.poll()

    def kill(self) -> None:
        """Kill the process and its children, if it still runs."""
        if self._popen is not None and self._popen.poll() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()

    def wait(self) -> Outcome:
        """Wait until it ends, at its time limit at the latest."""
        while (status := self.status()) is None:
            time.sleep(0.02)
        return Outcome(_content(self._output), self._failure or _reason(status, _content(self._errors)))


def start_command(name: str, *arguments: str, environment: Mapping[str, str]) -> Process | None:
    """Start an external command from the environment's PATH; None if it is not found."""
    path = shutil.which(name, path=environment.get("PATH", os.defpath))
    return None if path is None else Process([path, *arguments], environment=environment, seconds=COMMAND_SECONDS)


def start_module(
    name: str, *arguments: str, environment: Mapping[str, str], seconds: float = MODULE_SECONDS
) -> Process:
    """Start a module of this package with the same Python and module search path."""
    return Process(
        [sys.executable, "-P", "-m", f"megatron_specialm.doctor.{name}", *arguments],
        environment={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        seconds=seconds,
    )


def send_answer(make: Callable[[], Any]) -> None:
    """In a started module: send the parent a value on stdout, and nothing else, or fail with the reason."""
    answer = os.dup(1)
    os.dup2(2, 1)
    # SIGALRM ends a process that is stuck in C code and whose parent was killed.
    signal.alarm(int(4 * MODULE_SECONDS))
    try:
        os.write(answer, json.dumps(make()).encode())
    except BaseException as error:  # an imported package may call sys.exit
        print("\n" + one_line(f"{type(error).__name__}: {error}"), file=sys.stderr, flush=True)
        os._exit(1)  # the reason must be the last line


def wait_all(processes: Sequence[Process]) -> list[Outcome]:
    """Wait for processes that depend on each other. When one fails the others are killed, and only failures are returned."""
    while any(process.status() is None for process in processes):
        failed = [process for process in processes if process.status()]
        if failed:
            for process in processes:
                process.kill()
            return [process.wait() for process in failed]
        time.sleep(0.02)
    return [process.wait() for process in processes]


def _memory_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):  # Linux
        return os.fdopen(os.memfd_create("doctor"), "w+b")
    return tempfile.TemporaryFile()


def _content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _reason(status: int, errors: str) -> str:
    if status == 0:
        return ""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = errors.strip().splitlines()
    return one_line(lines[-1]) if lines else f"ended with status {status} and said nothing"
