"""The protocol between the supervisor of a Slurm job and the job's ranks. Both sides take every name from here.

The supervisor (`slurm/supervisor.py`) sets these variables for its ranks:

    SPECIALM_LAUNCHER=srun               whose variables say rank and world size: srun, torchrun or mpi
    SPECIALM_HEARTBEAT=host:port:token   where heartbeats go; without it there are none
    SPECIALM_HEARTBEAT_SECONDS=5         how often
    SPECIALM_ATTEMPT=FOLDER              where ranks leave their outcome; without it they leave none
    SPECIALM_INCARNATION=123_0/2         the fencing token: the array's element and the number of the attempt

While a rank works, it sends a `Heartbeat` as a datagram (JSON) at each interval; the answer says whether to stop. At its end it
leaves a file in FOLDER, because exit codes of launchers say too little: srun's can be 0 after a node was lost.

    finished.json       by rank 0: all tasks are done
    stopped.json        by rank 0: a request to stop was followed (`Saved`)
    error-<rank>.json   by each rank that fails (`Failure`, with the `exit_code` of the error in `base/errors.py`)
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_specialm.base.errors import MachineError

LAUNCHER = "SPECIALM_LAUNCHER"
HEARTBEAT = "SPECIALM_HEARTBEAT"
HEARTBEAT_SECONDS = "SPECIALM_HEARTBEAT_SECONDS"
ATTEMPT = "SPECIALM_ATTEMPT"
FENCING_TOKEN = "SPECIALM_INCARNATION"

FINISHED, STOPPED, ERRORS = "finished.json", "stopped.json", "error-*.json"

INTERVAL_SECONDS = 5.0
FRAMES = 8
FRAME_CHARACTERS = 100
NAME_CHARACTERS = 200  # of a node and of an activity
DATAGRAM_BYTES = 16_384  # more than any heartbeat or answer has, each character an escape
Name = Annotated[str, Field(max_length=NAME_CHARACTERS)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Frame = Annotated[str, Field(max_length=FRAME_CHARACTERS)]


@dataclass(frozen=True)
class Channel:
    """Where heartbeats go: a UDP address, and the token by which each side knows the other."""

    host: str
    port: int
    token: str
    seconds: float = INTERVAL_SECONDS

    def variables(self) -> dict[str, str]:
        """The variables that tell a rank."""
        return {HEARTBEAT: f"{self.host}:{self.port}:{self.token}", HEARTBEAT_SECONDS: str(self.seconds)}

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Channel | None":
        """The channel that the variables name; None where there is no supervisor.

        Raises:
            MachineError: a supervisor cannot have set the variables so.
        """
        address = environ.get(HEARTBEAT)
        if address is None:
            return None
        seconds = environ.get(HEARTBEAT_SECONDS, str(INTERVAL_SECONDS))
        try:
            host, port, token = address.rsplit(":", 2)
            channel = cls(host, int(port), token, float(seconds))
            host.encode("idna")  # as sending does
            if 0 < channel.port < 65_536 and 0 < channel.seconds < math.inf:
                return channel
            raise ValueError("out of range")
        except ValueError:
            raise MachineError(
                f"{HEARTBEAT}={address!r}, {HEARTBEAT_SECONDS}={seconds!r}: must be host:port:token and a number; the "
                "supervisor sets them, so unset them where there is none"
            ) from None


class Heartbeat(BaseModel):
    """The state of a rank. `progress` counts steps and batches, and is None for work that has no such count; `step` is the
    training step; `stack` has the innermost frames of the main thread, the innermost last."""

    model_config = ConfigDict(strict=True, frozen=True)

    token: str
    rank: Number
    node: Name
    activity: Name
    progress: Number | None
    step: Number | None
    stack: Annotated[tuple[Frame, ...], Field(max_length=FRAMES)]

    def encode(self) -> bytes:
        """The datagram."""
        return json.dumps(self.model_dump()).encode()

    @classmethod
    def decode(cls, datagram: bytes, *, token: str, ranks: int) -> "Heartbeat | None":
        """The heartbeat of one of `ranks` ranks; None for any other datagram, as anybody may send one."""
        if token.encode() not in datagram:
            return None  # not parsed: a flood of foreign datagrams must cost little
        try:
            beat = cls.model_validate_json(datagram)
        except ValidationError:
            return None
        return beat if beat.token == token and beat.rank < ranks else None


def encode_answer(token: str, *, stop: bool) -> bytes:
    """The supervisor's answer to a heartbeat."""
    return json.dumps({"token": token, "stop": stop}).encode()


def asks_to_stop(answer: bytes, token: str) -> bool:
    """Whether a datagram is the supervisor's answer, and asks the rank to stop. Only the supervisor knows the token."""
    try:
        message: Any = json.loads(answer)
    except (ValueError, RecursionError):  # the latter: nested brackets
        return False
    return isinstance(message, dict) and message.get("token") == token and message.get("stop") is True


@dataclass(frozen=True)
class Saved:
    """The content of `stopped.json`. `step`: of the checkpoint that was saved; None for work without steps."""

    step: int | None


@dataclass(frozen=True)
class Failure:
    """The content of an `error-<rank>.json`. `time` is Unix time."""

    error: str
    exit_code: int
    step: int | None
    node: str
    time: float


def error_path(folder: Path, rank: int) -> Path:
    """Where a rank leaves its error."""
    return folder / ERRORS.replace("*", str(rank))
