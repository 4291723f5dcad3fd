"""What a rank reports to the supervisor of its job: heartbeats while it works, its outcome at the end (`base/protocol.py`).

Datagrams reach the supervisor under any launcher and never block a training. A thread sends them: they continue while the main
thread waits in a collective, with the stack that says which one, and end when the node or the interpreter is lost.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from megatron_specialm.base.environment import World, node_name
from megatron_specialm.base.errors import SpecialmError, Stopped
from megatron_specialm.base.files import write_json
from megatron_specialm.base.printing import printable
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.protocol import (
    ATTEMPT,
    DATAGRAM_BYTES,
    FINISHED,
    FRAME_CHARACTERS,
    FRAMES,
    NAME_CHARACTERS,
    STOPPED,
    Channel,
    Failure,
    Heartbeat,
    Saved,
    asks_to_stop,
    error_path,
)

POLL_SECONDS = 0.2  # of each wait for an answer; the end of the process waits for the last one

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def heartbeat(
    process_status: ProcessStatus, world: World, *, environ: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Send heartbeats of this process within. A request to stop reaches the main thread as SIGTERM.

    Raises:
        MachineError: the variables of the heartbeat have wrong values.
    """
    channel = Channel.of(environ)
    if channel is None:
        yield
        return
    sender = _Sender(channel, process_status, world)
    sender.start()
    try:
        yield
    finally:
        sender.ended.set()
        sender.join()


class _Sender(threading.Thread):
    """The thread that sends. Errors of the network are ignored: it tries again at the next interval."""

    def __init__(self, channel: Channel, process_status: ProcessStatus, world: World) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.ended = threading.Event()
        self._channel, self._status, self._world = channel, process_status, world
        self._main_thread = threading.get_ident()
        self._stopped = False

    def run(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.settimeout(min(POLL_SECONDS, self._channel.seconds))
                while not self.ended.is_set():
                    udp.sendto(self._heartbeat().encode(), (self._channel.host, self._channel.port))
                    self._receive(udp)
            self.ended.wait(self._channel.seconds)

    def _receive(self, udp: socket.socket) -> None:
        """Read answers until the next heartbeat is due."""
        due = time.monotonic() + self._channel.seconds
        while not self.ended.is_set() and time.monotonic() < due:
            with contextlib.suppress(TimeoutError):
                if asks_to_stop(udp.recv(DATAGRAM_BYTES), self._channel.token) and not self._stopped:
                    self._stopped = True
                    signal.pthread_kill(self._main_thread, signal.SIGTERM)  # interrupts even a sleep

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            token=self._channel.token,
            rank=self._world.rank,
            node=printable(node_name())[:NAME_CHARACTERS],
            activity=printable(self._status.activity)[:NAME_CHARACTERS],
            progress=self._status.progress,
            step=self._status.step,
            stack=_stack(self._main_thread),
        )


def _stack(thread: int) -> tuple[str, ...]:
    """The innermost frames of a thread, innermost last, as `folder/file:line function`."""
    frame = sys._current_frames().get(thread)
    found: list[str] = []
    while frame is not None and len(found) < FRAMES:
        code = frame.f_code
        place = "/".join(PurePath(code.co_filename).parts[-2:])
        found.append(printable(f"{place}:{frame.f_lineno} {code.co_name}")[-FRAME_CHARACTERS:])
        frame = frame.f_back
    return tuple(found[::-1])


@contextlib.contextmanager
def recorded_outcome(
    world: World, process_status: ProcessStatus, *, environ: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Write how the code within ends, where there is a supervisor. Errors are raised again."""
    if ATTEMPT not in environ:
        yield
        return
    folder = Path(environ[ATTEMPT])
    try:
        yield
    except Stopped:
        if world.is_first:
            _write(folder / STOPPED, asdict(Saved(process_status.step)))
        raise
    except (Exception, KeyboardInterrupt) as error:
        _write(error_path(folder, world.rank), asdict(_failure(error, step=process_status.step)))
        raise
    if world.is_first:
        _write(folder / FINISHED, {"time": time.time()})


def _failure(error: BaseException, *, step: int | None) -> Failure:
    if isinstance(error, SpecialmError):
        message, exit_code = str(error), error.exit_code
    else:
        message, exit_code = f"{type(error).__name__}: {error}", 1
    return Failure(message, exit_code, step, node_name(), time.time())


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """A full disk must not hide the error that is to be reported."""
    try:
        write_json(path, value)
    except OSError as error:
        logger.warning("%s: cannot be written: %s", path, error)
