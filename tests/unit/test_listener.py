"""The supervisor's side of heartbeats: real datagrams of another process, and the stalls that are concluded from them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_specialm.base.protocol import Heartbeat
from megatron_specialm.config.site import Limits
from megatron_specialm.slurm.heartbeats import Listener, RankState, find_stall, format_states

ROOT = Path(__file__).parents[2]
LIMITS = Limits(silent_seconds=60, hang_seconds=900, startup_seconds=1800)
FIELDS = {"token": "t", "rank": 0, "node": "n0", "activity": "training", "progress": 1, "step": 1, "stack": ["a:1 f"]}
RANK = """
import time
from megatron_specialm.base.environment import World
from megatron_specialm.base.reporting import heartbeat
from megatron_specialm.base.process_status import ProcessStatus
process_status = ProcessStatus()
with process_status.stop_on_signals(), heartbeat(process_status, World(2, 4, 0, "", "test")):
    process_status.begin("training")
    for step in range(1, 6):
        process_status.beat(step=step)
    time.sleep(600)
"""


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener("127.0.0.1", ranks=4) as entered:
        yield entered


def _until(true: Callable[[], Any], *, of: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline and (of is None or of.poll() is None), "it does not come to that"
        time.sleep(0.01)


def test_a_rank_in_another_process_reports_and_is_stopped(listener: Listener) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK], stderr=subprocess.PIPE, text=True,
        env={**os.environ, **listener.channel(0.05).variables(), "PYTHONPATH": str(ROOT), "SLURMD_NODENAME": "node7"},
    )  # fmt: skip
    try:
        _until(lambda: listener.step == 5, of=process)
        state = listener.states[2]
        beat = state.beat
        assert (beat.rank, beat.node, beat.activity, beat.progress) == (2, "node7", "training", 5)
        assert beat.stack[-1].endswith("<module>") and state.advanced <= state.received <= time.monotonic()
        _until(lambda: listener.states[2].received > state.received, of=process)
        assert listener.states[2].advanced == state.advanced or beat.progress != 5, "no progress since"
        assert process.poll() is None, "it was not asked to stop"
        listener.stop = True
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Stopped: stopped by SIGTERM while training" in errors


def _send(listener: Listener, *datagrams: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for datagram in datagrams:
            udp.sendto(datagram, ("127.0.0.1", listener.channel(5).port))


def test_foreign_datagrams_are_ignored(listener: Listener) -> None:
    channel = listener.channel(5)
    guessed, cut = json.dumps({**FIELDS, "token": "guessed"}), json.dumps({"token": channel.token, "rank": 1})
    _send(listener, b"", b"\xff\x00", b"null", b"[]", b"{}", b"[" * 60_000, guessed.encode(), cut.encode())
    _send(listener, json.dumps({**FIELDS, "token": channel.token, "rank": 3}).encode())
    _until(lambda: listener.states)
    assert list(listener.states) == [3]


def _parsed(**changes: Any) -> Heartbeat | None:
    return Heartbeat.decode(json.dumps({**FIELDS, **changes}).encode(), token="t", ranks=4)


def test_only_a_whole_heartbeat_with_the_token_is_decoded() -> None:
    beat = Heartbeat.model_validate(FIELDS | {"stack": tuple(FIELDS["stack"])})
    assert _parsed() == beat == Heartbeat.decode(beat.encode(), token="t", ranks=4)
    assert _parsed(progress=None, step=None, stack=[], more=1) is not None
    for name in FIELDS:
        cut = json.dumps({key: value for key, value in FIELDS.items() if key != name}).encode()
        assert Heartbeat.decode(cut, token="t", ranks=4) is None
    assert Heartbeat.decode(json.dumps(FIELDS).encode(), token="other", ranks=4) is None
    assert Heartbeat.decode(json.dumps({**FIELDS, "token": "else", "node": "t"}).encode(), token="t", ranks=4) is None


NEVER: list[Any] = [
    True, False, -1, 1.5, 1e308, float("nan"), 2**63, 10**400, [1], [[["x"]]], [None], {}, {"a": 1}, "z" * 201, ["x"] * 9,
    ["z" * 101],
]  # fmt: skip
WRONG = {
    "token": [None, "", "T", *NEVER],
    "rank": [None, "0", "", 4, 2**31, *NEVER],  # numbers of ranks that were never launched, too
    "node": [None, ["n0"], *NEVER],
    "activity": [None, ["training"], *NEVER],
    "progress": ["1", "", *NEVER],
    "step": ["1", "", *NEVER],
    "stack": [None, "a:1 f", "", 5, *NEVER],
}


def test_a_field_of_another_type_or_range_is_ignored(listener: Listener) -> None:
    """Each with the right token, over the wire; then a good one is received, and only that."""
    token = listener.channel(5).token
    wrong = [{**FIELDS, "token": token, field: value} for field, values in WRONG.items() for value in values]
    assert len(wrong) > 120
    for fields in wrong:
        assert Heartbeat.decode(json.dumps(fields).encode(), token=token, ranks=4) is None, fields
        _send(listener, json.dumps(fields).encode())
    _send(listener, json.dumps({**FIELDS, "token": token, "rank": 3}).encode())
    _until(lambda: listener.states)
    assert list(listener.states) == [3]


def test_a_flood_of_foreign_datagrams_loses_no_rank(listener: Listener) -> None:
    token = listener.channel(5).token
    flood = [b"[" * 60_000, json.dumps({**FIELDS, "token": "x" * 32}).encode(), json.dumps({"token": token}).encode()]
    for step in range(1, 4):
        good = json.dumps({**FIELDS, "token": token, "rank": 1, "step": step}).encode()
        _until(lambda good=good, step=step: _send(listener, *flood * 30, good) or listener.step == step)
    assert list(listener.states) == [1]


def test_progress_is_a_new_number_or_a_new_activity() -> None:
    def beat(**changes: Any) -> Heartbeat:
        found = _parsed(**changes)
        assert found is not None
        return found

    first = RankState(beat(), 10.0, 10.0)
    same = first.after(beat(step=7, stack=[]), now=20.0)
    assert (same.received, same.advanced, same.beat.step) == (20.0, 10.0, 7)
    assert same.after(beat(step=7), now=25.0).advanced == 10.0
    assert same.after(beat(progress=2), now=30.0).advanced == 30.0
    assert same.after(beat(activity="saving"), now=30.0).advanced == 30.0


def _states(*changes: dict[str, Any], **common: Any) -> dict[int, RankState]:
    """Ranks 0, 1, ... on nodes n0, n1, ..., all in an all-reduce of step 5 since second 0, with the last heartbeat at second
    1000."""
    usual = {"token": "t", "activity": "training", "progress": 5, "step": 5, "stack": ("loop:9 run", "reduce:3 wait"),
             "received": 1000.0, "advanced": 0.0}  # fmt: skip
    states = {}
    for rank, change in enumerate(changes):
        fields = {"rank": rank, "node": f"n{rank}", **usual, **common, **change}
        received, advanced = fields.pop("received"), fields.pop("advanced")
        states[rank] = RankState(Heartbeat(**fields), received, advanced)
    return states


def test_no_stall() -> None:
    assert find_stall({}, LIMITS, now=1e9) is None, "a network without datagrams"
    assert find_stall(_states({}, {}, advanced=999.0), LIMITS, now=1001.0) is None
    assert find_stall(_states({}, {}), LIMITS, now=900.0) is None
    assert find_stall(_states({}, {"advanced": 500.0}), LIMITS, now=1001.0) is None, (
        "one makes progress: the others will"
    )


def test_a_silent_rank_is_lost_with_its_node() -> None:
    found = find_stall(
        _states({}, {"received": 900.0}, {"received": 900.0, "node": "n1"}, advanced=899.0), LIMITS, now=961.0
    )
    assert found is not None and found.nodes == ("n1",)
    assert found.reason == "no heartbeat for 60 s of rank 1 on n1, rank 2 on n1"
    assert find_stall(_states({}, {"received": 900.0}, advanced=899.0), LIMITS, now=960.0) is None


def test_the_rank_that_is_behind_is_named() -> None:
    found = find_stall(_states({}, {"step": 4}, {}), LIMITS, now=1001.0)
    assert found is not None and found.nodes == ("n1",)
    assert found.reason == "no progress for 1001 s; rank 1 on n1 in loop:9 run > reduce:3 wait; the others wait"


def test_a_rank_without_a_step_is_behind_all_others() -> None:
    found = find_stall(_states({}, {"step": None}, {"step": 6}), LIMITS, now=1001.0)
    assert found is not None and found.nodes == ("n1",)


def test_the_rank_that_is_elsewhere_is_named() -> None:
    found = find_stall(_states({}, {}, {"stack": ("loop:9 run", "data:7 read")}), LIMITS, now=1001.0)
    assert found is not None and found.nodes == ("n2",)
    assert "rank 2 on n2 in loop:9 run > data:7 read; the others wait" in found.reason


def test_where_all_ranks_are_in_the_same_line_no_node_is_named() -> None:
    found = find_stall(_states({}, {}, {}), LIMITS, now=1001.0)
    assert found is not None and found.nodes == ()
    assert found.reason == "no progress for 1001 s; all 3 ranks are in loop:9 run > reduce:3 wait"


def test_work_without_progress_is_never_a_hang_but_a_start_is() -> None:
    working = _states({}, {"progress": 5}, activity="tokens/generic", progress=None, received=1e6)
    assert find_stall(working, LIMITS, now=1e6) is None
    starting = _states({}, {}, activity="starting", progress=None, step=None, received=1800.0)
    assert find_stall(starting, LIMITS, now=1800.0) is None
    assert find_stall(starting, LIMITS, now=1801.0) is not None


def test_the_description_names_each_rank_and_its_frames() -> None:
    text = format_states(_states({}, {"step": 4}), now=1010.0)
    assert "rank 1 on n1: training, step 4, last heartbeat 10 s ago, no progress for 1010 s\n    loop:9 run" in text
