"""The supervisor's end of the ranks' heartbeats: who has said what last, who has gone silent, and who does not get on.

Ranks send datagrams (`base/heartbeat.py`); the answer to each says whether to stop. Where a network lets no datagrams through,
ranks are never heard: then nothing is concluded from their silence, and hangs are left to the launcher's own time limits.
"""

import contextlib
import json
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_specialm.base.heartbeat import FRAME_CHARACTERS, FRAMES, NAME_CHARACTERS
from megatron_specialm.config.site import Limits

DATAGRAM_BYTES = 16_384  # more than any heartbeat has, each letter an escape
LOOK_SECONDS = 0.2
Text = Annotated[str, Field(max_length=NAME_CHARACTERS)]
Number = Annotated[int, Field(ge=0, lt=2**63)]
Frame = Annotated[str, Field(max_length=FRAME_CHARACTERS)]


class Said(BaseModel):
    """A heartbeat's content, as `base/heartbeat.py` sends it: each field is there, and of its type and size."""

    model_config = ConfigDict(strict=True, frozen=True)

    token: str
    rank: Number
    node: Text
    activity: Text
    progress: Number | None
    step: Number | None
    stack: Annotated[tuple[Frame, ...], Field(max_length=FRAMES)]


@dataclass(frozen=True)
class Beat:
    """What a rank said last. `heard` and `advanced` are this process's monotonic seconds: of the datagram, and of the first
    one with its present progress."""

    rank: int
    node: str
    activity: str
    progress: int | None
    step: int | None
    stack: tuple[str, ...]
    heard: float
    advanced: float


@dataclass(frozen=True)
class Stall:
    """Ranks that hold up a job. `nodes` are theirs, where that says anything about the nodes."""

    reason: str
    nodes: tuple[str, ...]


@dataclass
class Listener:
    """Receives heartbeats of so many ranks in a thread of its own while it is entered. `stop` tells every rank that asks to
    stop."""

    address: str
    ranks: int
    stop: bool = False
    beats: dict[int, Beat] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._token = secrets.token_hex(16)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        self._socket.settimeout(LOOK_SECONDS)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="heartbeats", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()

    @property
    def channel(self) -> str:
        """The value of SPECIALM_HEARTBEAT for the ranks."""
        return f"{self.address}:{self._socket.getsockname()[1]}:{self._token}"

    @property
    def step(self) -> int | None:
        """The last training step that any rank spoke of."""
        return max((beat.step for beat in list(self.beats.values()) if beat.step is not None), default=None)

    def forgive(self, seconds: float) -> None:
        """Take it that the ranks have been as unable to speak as this process was for so long."""
        for rank, beat in list(self.beats.items()):
            self.beats[rank] = replace(beat, heard=beat.heard + seconds, advanced=beat.advanced + seconds)

    def _listen(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                datagram, sender = self._socket.recvfrom(DATAGRAM_BYTES)
                said = parse(datagram, token=self._token, ranks=self.ranks)
                if said is not None:
                    beat = heard(said, self.beats.get(said.rank), now=time.monotonic())
                    self.beats[beat.rank] = beat
                    self._socket.sendto(json.dumps({"token": self._token, "stop": self.stop}).encode(), sender)


def parse(datagram: bytes, *, token: str, ranks: int) -> Said | None:
    """A heartbeat of one of so many ranks; None for what anybody else may have sent, which costs next to nothing."""
    if token.encode() not in datagram:
        return None
    try:
        said = Said.model_validate_json(datagram)
    except ValidationError:
        return None
    return said if said.token == token and said.rank < ranks else None


def heard(said: Said, before: Beat | None, *, now: float) -> Beat:
    """A rank's new state."""
    same = before is not None and (before.activity, before.progress) == (said.activity, said.progress)
    advanced = before.advanced if before is not None and same else now
    return Beat(said.rank, said.node, said.activity, said.progress, said.step, said.stack, heard=now, advanced=advanced)


def trouble(beats: Mapping[int, Beat], limits: Limits, *, now: float) -> Stall | None:
    """What is wrong with ranks, by what they said; None while nothing is.

    A rank that was heard and has gone silent is lost, or its node is. Where all speak and none gets on, those are named whose
    innermost frames the fewest share: the others wait for them.
    """
    if silent := not_heard(beats, limits.silent_seconds, now=now):
        nodes = tuple(sorted({beat.node for beat in silent}))
        return Stall(f"no heartbeat for {limits.silent_seconds:g} s of {who(silent)}", nodes)
    if not beats or any(now - beat.advanced <= _patience(beat, limits) for beat in beats.values()):
        return None
    suspects = _fewest(list(beats.values()))
    waited = now - max(beat.advanced for beat in beats.values())
    where = " > ".join(suspects[0].stack[-3:])
    if len(suspects) == len(beats):
        return Stall(f"no progress for {waited:.0f} s; all {len(beats)} ranks are in {where}", ())
    nodes = tuple(sorted({beat.node for beat in suspects}))
    return Stall(f"no progress for {waited:.0f} s; {who(suspects)} in {where}; the others wait", nodes)


def not_heard(beats: Mapping[int, Beat], seconds: float, *, now: float) -> list[Beat]:
    """The ranks that were heard once, and not for so long."""
    return [beat for beat in beats.values() if now - beat.heard > seconds]


def _patience(beat: Beat, limits: Limits) -> float:
    """Seconds without progress that are nothing unusual; for work that tells no progress, any number."""
    if beat.progress is not None:
        return limits.hang_seconds
    return limits.startup_seconds if beat.activity == "starting" else float("inf")


def _fewest(beats: list[Beat]) -> list[Beat]:
    steps = [-1 if beat.step is None else beat.step for beat in beats]  # one without a step has not even begun
    if len(set(steps)) > 1:
        return [beat for beat, step in zip(beats, steps, strict=True) if step == min(steps)]
    counts = Counter(beat.stack[-1:] for beat in beats)
    rarest = min(counts.values())
    return [beat for beat in beats if counts[beat.stack[-1:]] == rarest] if len(counts) > 1 else beats


def who(beats: list[Beat]) -> str:
    """Ranks with their nodes, the first eight of them."""
    return ", ".join(f"rank {beat.rank} on {beat.node}" for beat in sorted(beats, key=lambda beat: beat.rank)[:8])


def describe(beats: Mapping[int, Beat], *, now: float) -> str:
    """All that is known of all ranks, for the log of a job that hung."""
    lines = []
    for beat in sorted(beats.values(), key=lambda beat: beat.rank):
        lines.append(
            f"rank {beat.rank} on {beat.node}: {beat.activity}, step {beat.step}, heard {now - beat.heard:.0f} s ago, "
            f"without progress for {now - beat.advanced:.0f} s"
        )
        lines += [f"    {frame}" for frame in beat.stack]
    return "\n".join(lines)
