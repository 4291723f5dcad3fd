"""A rank's heartbeat: small datagrams that say where it stands; the answers say whether it is to stop.

    SPECIALM_HEARTBEAT=host:port:token    where to; set by the supervisor, and without it there is no heartbeat
    SPECIALM_HEARTBEAT_SECONDS=5          how often

Datagrams reach the supervisor under any launcher and never block training. Each is bounded in size and of one form, by which
the supervisor knows it (`slurm/heartbeats.py`). A thread sends them: they go on while the main thread waits in a collective,
with the stack that says which, and end when the node or the interpreter is lost.
"""

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from megatron_specialm.base.environment import World, node_name
from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.printing import printable
from megatron_specialm.base.process_status import ProcessStatus

INTERVAL_SECONDS = 5.0
FRAMES = 8
FRAME_CHARACTERS = 100
NAME_CHARACTERS = 200  # of a node, and of what is done there
ANSWER_BYTES = 4096
PATIENCE_SECONDS = 0.2  # of each look for an answer: the end of the process waits for the last one


@dataclass(frozen=True)
class Channel:
    """Where heartbeats go: a UDP address, and the token by which either side knows the other."""

    host: str
    port: int
    token: str
    seconds: float = INTERVAL_SECONDS

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Channel | None":
        """The supervisor's, if there is one.

        Raises:
            MachineError: variables that the supervisor cannot have set.
        """
        address = environ.get("SPECIALM_HEARTBEAT")
        if address is None:
            return None
        seconds = environ.get("SPECIALM_HEARTBEAT_SECONDS", str(INTERVAL_SECONDS))
        try:
            host, port, token = address.rsplit(":", 2)
            channel = cls(host, int(port), token, float(seconds))
            host.encode("idna")  # as sending does
            if 0 < channel.port < 65_536 and 0 < channel.seconds < math.inf:
                return channel
            raise ValueError("out of range")
        except ValueError:
            raise MachineError(
                f"SPECIALM_HEARTBEAT={address!r}, SPECIALM_HEARTBEAT_SECONDS={seconds!r}: must be host:port:token and a "
                "number; the supervisor sets them, so unset them where there is none"
            ) from None


@contextlib.contextmanager
def heartbeat(
    process_status: ProcessStatus, world: World, *, environ: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Send heartbeats of this process within. A request to stop comes to the main thread as SIGTERM."""
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
    """Whatever the network does, this only tries again."""

    def __init__(self, channel: Channel, process_status: ProcessStatus, world: World) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.ended = threading.Event()
        self._channel, self._lifeline, self._world = channel, process_status, world
        self._main_thread = threading.get_ident()
        self._told = False

    def run(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
                line.settimeout(min(PATIENCE_SECONDS, self._channel.seconds))
                while not self.ended.is_set():
                    line.sendto(self._datagram(), (self._channel.host, self._channel.port))
                    self._listen(line)
            self.ended.wait(self._channel.seconds)

    def _listen(self, line: socket.socket) -> None:
        """Read what comes until the next heartbeat is due."""
        due = time.monotonic() + self._channel.seconds
        while not self.ended.is_set() and time.monotonic() < due:
            with contextlib.suppress(TimeoutError):
                if _says_stop(line.recv(ANSWER_BYTES), self._channel.token) and not self._told:
                    self._told = True
                    signal.pthread_kill(self._main_thread, signal.SIGTERM)  # wakes it even from a sleep

    def _datagram(self) -> bytes:
        process_status = self._lifeline
        return json.dumps(
            {
                "token": self._channel.token, "rank": self._world.rank, "node": printable(node_name())[:NAME_CHARACTERS],
                "progress": process_status.progress, "step": process_status.step,
                "activity": printable(process_status.activity)[:NAME_CHARACTERS], "stack": _stack(self._main_thread),
            }
        ).encode()  # fmt: skip


def _says_stop(answer: bytes, token: str) -> bool:
    """Anybody can send a datagram: only the supervisor knows the token."""
    try:
        message: Any = json.loads(answer)
    except (ValueError, RecursionError):  # the latter: brackets within brackets
        return False
    return isinstance(message, dict) and message.get("token") == token and message.get("stop") is True


def _stack(thread: int) -> list[str]:
    """The innermost frames of a thread, innermost last, as `folder/file:line function`."""
    frame = sys._current_frames().get(thread)
    found: list[str] = []
    while frame is not None and len(found) < FRAMES:
        code = frame.f_code
        place = "/".join(PurePath(code.co_filename).parts[-2:])
        found.append(printable(f"{place}:{frame.f_lineno} {code.co_name}")[-FRAME_CHARACTERS:])
        frame = frame.f_back
    return found[::-1]
