"""The supervisor's end of heartbeats: over real datagrams of another process, and what is concluded from them."""

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

from megatron_specialm.base.heartbeat import Channel
from megatron_specialm.config.site import Limits
from megatron_specialm.slurm.heartbeats import Beat, Listener, Said, describe, heard, parse, trouble

ROOT = Path(__file__).parents[2]
LIMITS = Limits(silent_seconds=60, hang_seconds=900, startup_seconds=1800)
FIELDS = {"token": "t", "rank": 0, "node": "n0", "activity": "training", "progress": 1, "step": 1, "stack": ["a:1 f"]}
RANK = """
import time
from megatron_specialm.base.environment import World
from megatron_specialm.base.heartbeat import heartbeat
from megatron_specialm.base.process_status import ProcessStatus
process_status = ProcessStatus()
with process_status.hearing_signals(), heartbeat(process_status, World(2, 4, 0, "", "test")):
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


def test_a_rank_in_another_process_is_heard_and_stopped(listener: Listener) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "SPECIALM_HEARTBEAT": listener.channel, "SPECIALM_HEARTBEAT_SECONDS": "0.05",
             "PYTHONPATH": str(ROOT), "SLURMD_NODENAME": "node7"},
    )  # fmt: skip
    try:
        _until(lambda: listener.step == 5, of=process)
        beat = listener.beats[2]
        assert (beat.rank, beat.node, beat.activity, beat.progress) == (2, "node7", "training", 5)
        assert beat.stack[-1].endswith("<module>") and beat.advanced <= beat.heard <= time.monotonic()
        _until(lambda: listener.beats[2].heard > beat.heard, of=process)
        assert listener.beats[2].advanced == beat.advanced or beat.progress != 5, "it has not got on since"
        assert process.poll() is None, "nobody has asked it to stop"
        listener.stop = True
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Stopped: stopped by SIGTERM while training" in said


def _send(listener: Listener, *datagrams: bytes) -> None:
    port = int(listener.channel.split(":")[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        for datagram in datagrams:
            line.sendto(datagram, ("127.0.0.1", port))


def test_what_anybody_may_send_neither_counts_nor_deafens(listener: Listener) -> None:
    channel = Channel.of({"SPECIALM_HEARTBEAT": listener.channel})
    assert channel is not None
    guessed, cut = json.dumps({**FIELDS, "token": "guessed"}), json.dumps({"token": channel.token, "rank": 1})
    _send(listener, b"", b"\xff\x00", b"null", b"[]", b"{}", b"[" * 60_000, guessed.encode(), cut.encode())
    _send(listener, json.dumps({**FIELDS, "token": channel.token, "rank": 3}).encode())
    _until(lambda: listener.beats)
    assert list(listener.beats) == [3]


def _parsed(**changes: Any) -> Said | None:
    return parse(json.dumps({**FIELDS, **changes}).encode(), token="t", ranks=4)


def test_a_heartbeat_and_what_is_none() -> None:
    assert _parsed() == Said.model_validate(FIELDS | {"stack": tuple(FIELDS["stack"])})
    assert _parsed(progress=None, step=None, stack=[], more=1) is not None
    for name in FIELDS:
        cut = json.dumps({key: value for key, value in FIELDS.items() if key != name}).encode()
        assert parse(cut, token="t", ranks=4) is None
    assert parse(json.dumps(FIELDS).encode(), token="other", ranks=4) is None
    assert parse(json.dumps({**FIELDS, "token": "else", "node": "t"}).encode(), token="t", ranks=4) is None


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


def test_a_field_of_another_type_or_range_is_none_and_deafens_nobody(listener: Listener) -> None:
    """Each with the right token, over the wire; then a good one is heard, and nothing else was."""
    token = listener.channel.split(":")[2]
    wrong = [{**FIELDS, "token": token, field: value} for field, values in WRONG.items() for value in values]
    assert len(wrong) > 120
    for said in wrong:
        assert parse(json.dumps(said).encode(), token=token, ranks=4) is None, said
        _send(listener, json.dumps(said).encode())
    _send(listener, json.dumps({**FIELDS, "token": token, "rank": 3}).encode())
    _until(lambda: listener.beats)
    assert list(listener.beats) == [3]


def test_a_flood_of_others_drowns_nobody(listener: Listener) -> None:
    token = listener.channel.split(":")[2]
    flood = [b"[" * 60_000, json.dumps({**FIELDS, "token": "x" * 32}).encode(), json.dumps({"token": token}).encode()]
    for step in range(1, 4):
        good = json.dumps({**FIELDS, "token": token, "rank": 1, "step": step}).encode()
        _until(lambda good=good, step=step: _send(listener, *flood * 30, good) or listener.step == step)
    assert list(listener.beats) == [1]


def test_progress_is_a_new_number_or_a_new_activity() -> None:
    def said(**changes: Any) -> Said:
        found = _parsed(**changes)
        assert found is not None
        return found

    first = heard(said(), None, now=10.0)
    assert (first.heard, first.advanced) == (10.0, 10.0)
    same = heard(said(step=7, stack=[]), first, now=20.0)
    assert (same.heard, same.advanced, same.step) == (20.0, 10.0, 7)
    assert heard(said(step=7), same, now=25.0).advanced == 10.0
    assert heard(said(progress=2), same, now=30.0).advanced == 30.0
    assert heard(said(activity="saving"), same, now=30.0).advanced == 30.0


def _beats(*changes: dict[str, Any], **common: Any) -> dict[int, Beat]:
    """Ranks 0, 1, ... on nodes n0, n1, ..., all in an all-reduce of step 5 since second 0, and last heard at second 1000."""
    usual = {"activity": "training", "progress": 5, "step": 5, "stack": ("loop:9 run", "reduce:3 wait"), "heard": 1000.0,
             "advanced": 0.0}  # fmt: skip
    return {
        rank: Beat(**{"rank": rank, "node": f"n{rank}", **usual, **common, **change})
        for rank, change in enumerate(changes)
    }


def test_nothing_is_wrong() -> None:
    assert trouble({}, LIMITS, now=1e9) is None, "a network without datagrams is no trouble"
    assert trouble(_beats({}, {}, advanced=999.0), LIMITS, now=1001.0) is None
    assert trouble(_beats({}, {}), LIMITS, now=900.0) is None
    assert trouble(_beats({}, {"advanced": 500.0}), LIMITS, now=1001.0) is None, "one gets on: the others will"


def test_a_silent_rank_is_lost_with_its_node() -> None:
    found = trouble(_beats({}, {"heard": 900.0}, {"heard": 900.0, "node": "n1"}, advanced=899.0), LIMITS, now=961.0)
    assert found is not None and found.nodes == ("n1",)
    assert found.reason == "no heartbeat for 60 s of rank 1 on n1, rank 2 on n1"
    assert trouble(_beats({}, {"heard": 900.0}, advanced=899.0), LIMITS, now=960.0) is None


def test_the_rank_that_is_behind_is_named() -> None:
    found = trouble(_beats({}, {"step": 4}, {}), LIMITS, now=1001.0)
    assert found is not None and found.nodes == ("n1",)
    assert found.reason == "no progress for 1001 s; rank 1 on n1 in loop:9 run > reduce:3 wait; the others wait"


def test_a_rank_without_a_step_is_behind_all_others() -> None:
    found = trouble(_beats({}, {"step": None}, {"step": 6}), LIMITS, now=1001.0)
    assert found is not None and found.nodes == ("n1",)


def test_the_rank_that_is_elsewhere_is_named() -> None:
    found = trouble(_beats({}, {}, {"stack": ("loop:9 run", "data:7 read")}), LIMITS, now=1001.0)
    assert found is not None and found.nodes == ("n2",)
    assert "rank 2 on n2 in loop:9 run > data:7 read; the others wait" in found.reason


def test_where_all_are_alike_nobody_is_blamed() -> None:
    found = trouble(_beats({}, {}, {}), LIMITS, now=1001.0)
    assert found is not None and found.nodes == ()
    assert found.reason == "no progress for 1001 s; all 3 ranks are in loop:9 run > reduce:3 wait"


def test_work_that_tells_no_progress_is_never_a_hang_but_a_start_is() -> None:
    working = _beats({}, {"progress": 5}, activity="tokens/generic", progress=None, heard=1e6)
    assert trouble(working, LIMITS, now=1e6) is None
    starting = _beats({}, {}, activity="starting", progress=None, step=None, heard=1800.0)
    assert trouble(starting, LIMITS, now=1800.0) is None
    assert trouble(starting, LIMITS, now=1801.0) is not None


def test_the_description_names_each_rank_and_its_frames() -> None:
    said = describe(_beats({}, {"step": 4}), now=1010.0)
    assert "rank 1 on n1: training, step 4, heard 10 s ago, without progress for 1010 s\n    loop:9 run" in said
