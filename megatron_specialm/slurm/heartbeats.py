"""The supervisor's side of heartbeats: the state of each rank, ranks that are silent, and ranks that make no progress.

Ranks send datagrams; the answer to each says whether to stop (`base/protocol.py`). Where a network drops datagrams, no rank
ever reports: then silence means nothing, and hangs are left to the launcher's own timeouts.
"""

import contextlib
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from megatron_specialm.base.protocol import DATAGRAM_BYTES, Channel, Heartbeat, encode_answer
from megatron_specialm.config.site import Limits

POLL_SECONDS = 0.2
SHOWN_RANKS = 8


@dataclass(frozen=True)
class RankState:
    """The last heartbeat of a rank. `received` and `advanced` are this process's monotonic seconds: of the last heartbeat, and
    of the first one with its present progress."""

    beat: Heartbeat
    received: float
    advanced: float

    def after(self, beat: Heartbeat, *, now: float) -> "RankState":
        """The state after another heartbeat. Progress is a new number or a new activity."""
        same = (self.beat.activity, self.beat.progress) == (beat.activity, beat.progress)
        return RankState(beat, now, self.advanced if same else now)

    def __str__(self) -> str:
        return f"rank {self.beat.rank} on {self.beat.node}"


@dataclass(frozen=True)
class Stall:
    """Ranks that hold up a job. `nodes` are theirs, where the nodes may be the cause."""

    reason: str
    nodes: tuple[str, ...]


@dataclass
class Listener:
    """Receives the heartbeats of so many ranks, in a thread of its own while it is entered. `stop` asks every rank to stop."""

    address: str
    ranks: int
    stop: bool = False
    states: dict[int, RankState] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._token = secrets.token_hex(16)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        self._socket.settimeout(POLL_SECONDS)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="heartbeats", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()

    def channel(self, seconds: float) -> Channel:
        """Where ranks are to send a heartbeat every so many seconds."""
        return Channel(self.address, self._socket.getsockname()[1], self._token, seconds)

    @property
    def step(self) -> int | None:
        """The last training step that any rank has reported."""
        steps = [state.beat.step for state in list(self.states.values())]
        return max((step for step in steps if step is not None), default=None)

    def extend_deadlines(self, seconds: float) -> None:
        """Do not count so many seconds, in which this process was suspended and the ranks probably too."""
        for rank, state in list(self.states.items()):
            self.states[rank] = replace(state, received=state.received + seconds, advanced=state.advanced + seconds)

    def _listen(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                datagram, sender = self._socket.recvfrom(DATAGRAM_BYTES)
                beat = Heartbeat.decode(datagram, token=self._token, ranks=self.ranks)
                if beat is not None:
                    now = time.monotonic()
                    self.states[beat.rank] = self.states.get(beat.rank, RankState(beat, now, now)).after(beat, now=now)
                    self._socket.sendto(encode_answer(self._token, stop=self.stop), sender)


def find_stall(states: Mapping[int, RankState], limits: Limits, *, now: float) -> Stall | None:
    """The ranks that hold up a job, if any: first those that are silent; else, where no rank has made progress for long, those
    at the earliest step; else those that are in another line than most."""
    if silent := silent_ranks(states, limits.silent_seconds, now=now):
        return Stall(f"no heartbeat for {limits.silent_seconds:g} s of {format_ranks(silent)}", _nodes(silent))
    if not states or any(now - state.advanced <= _allowed_seconds(state.beat, limits) for state in states.values()):
        return None
    suspects = _suspects(list(states.values()))
    waited = now - max(state.advanced for state in states.values())
    where = " > ".join(suspects[0].beat.stack[-3:])
    if len(suspects) == len(states):
        return Stall(f"no progress for {waited:.0f} s; all {len(states)} ranks are in {where}", ())
    reason = f"no progress for {waited:.0f} s; {format_ranks(suspects)} in {where}; the others wait"
    return Stall(reason, _nodes(suspects))


def silent_ranks(states: Mapping[int, RankState], seconds: float, *, now: float) -> list[RankState]:
    """The ranks whose last heartbeat is older than so many seconds. One that has never reported is not among them."""
    return [state for state in states.values() if now - state.received > seconds]


def _nodes(states: Iterable[RankState]) -> tuple[str, ...]:
    return tuple(sorted({state.beat.node for state in states}))


def _allowed_seconds(beat: Heartbeat, limits: Limits) -> float:
    """Seconds without progress that are normal; unlimited for work that reports none."""
    if beat.progress is not None:
        return limits.hang_seconds
    return limits.startup_seconds if beat.activity == "starting" else float("inf")


def _suspects(states: list[RankState]) -> list[RankState]:
    steps = [-1 if state.beat.step is None else state.beat.step for state in states]  # without a step: not begun
    if len(set(steps)) > 1:
        return [state for state, step in zip(states, steps, strict=True) if step == min(steps)]
    counts = Counter(state.beat.stack[-1:] for state in states)
    rarest = min(counts.values())
    return [state for state in states if counts[state.beat.stack[-1:]] == rarest] if len(counts) > 1 else states


def format_ranks(states: Iterable[RankState]) -> str:
    """The first eight ranks with their nodes."""
    return ", ".join(map(str, sorted(states, key=lambda state: state.beat.rank)[:SHOWN_RANKS]))


def format_states(states: Mapping[int, RankState], *, now: float) -> str:
    """All that is known of all ranks, for the log of a job that hangs."""
    lines = []
    for _, state in sorted(states.items()):
        lines.append(
            f"{state}: {state.beat.activity}, step {state.beat.step}, last heartbeat {now - state.received:.0f} s ago, "
            f"no progress for {now - state.advanced:.0f} s"
        )
        lines += [f"    {frame}" for frame in state.beat.stack]
    return "\n".join(lines)
