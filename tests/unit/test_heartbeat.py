"""The heartbeat over real sockets, of a thread or of another process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_specialm.base.environment import World
from megatron_specialm.base.errors import MachineError, Stopped
from megatron_specialm.base.printing import printable
from megatron_specialm.base.process_status import ProcessStatus
from megatron_specialm.base.protocol import DATAGRAM_BYTES, Channel, Heartbeat
from megatron_specialm.base.reporting import heartbeat

ROOT = Path(__file__).parents[2]
WORLD = World(3, 4, 1, "", "test")


@pytest.fixture
def supervisor() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        udp.settimeout(60)
        yield udp


def _environ(supervisor: socket.socket) -> dict[str, str]:
    port = supervisor.getsockname()[1]
    return Channel("127.0.0.1", port, "secret", 0.05).variables()


def _receive(supervisor: socket.socket) -> tuple[dict, tuple]:
    datagram, sender = supervisor.recvfrom(65_536)
    assert len(datagram) < 1400, "it must fit a packet"
    return json.loads(datagram), sender


def test_it_reports_rank_stack_and_progress(supervisor: socket.socket) -> None:
    process_status = ProcessStatus()
    with heartbeat(process_status, WORLD, environ=_environ(supervisor)):
        first, _ = _receive(supervisor)
        assert (first["token"], first["rank"]) == ("secret", 3)
        assert first["progress"] is None and first["step"] is None
        assert any("unit/test_heartbeat.py:" in frame for frame in first["stack"])
        process_status.begin("training")
        for step in (1, 2):
            process_status.beat(step=step)
        while (last := _receive(supervisor)[0])["step"] != 2:
            pass
        assert (last["progress"], last["activity"]) == (2, "training")


STOP = {"token": "secret", "stop": True}
WRONG = [None, False, 0, 1, -1, 1e308, "", "true", "x" * 3000, [], [True], {}, {"a": 1}, 10**400, float("nan")]
NO_STOP = [
    b"", b"\xff", b"\x00", b"[]", b"null", b"stop", b"{", b"[" * 4000, b'{"a":' * 800,
    b'{"token": "secret", "stop": ' + b"9" * 4000 + b"}", b'{"token": "secret"}', b'{"stop": true}',
    *(json.dumps({**STOP, field: value}).encode() for field in STOP for value in [*WRONG, "guessed"]),
]  # fmt: skip


@pytest.mark.parametrize(
    "activity", ["x" * 10**6, "\x1b]0;title\x07", "\ud800", "日本語" * 1000], ids=["long", "steers", "half", "wide"]
)
def test_any_activity_makes_a_datagram_that_the_supervisor_accepts(supervisor: socket.socket, activity: str) -> None:
    process_status = ProcessStatus()
    process_status.begin(activity)
    with heartbeat(process_status, WORLD, environ=_environ(supervisor)):
        datagram = supervisor.recv(65_536)
    assert len(datagram) <= DATAGRAM_BYTES
    beat = Heartbeat.decode(datagram, token="secret", ranks=4)
    assert beat is not None and beat.activity == printable(activity)[:200]


def test_only_the_supervisor_can_stop_it_and_one_request_is_enough(supervisor: socket.socket) -> None:
    process_status = ProcessStatus()
    beating = heartbeat(process_status, WORLD, environ=_environ(supervisor))
    with process_status.stop_on_signals(), process_status.at_step_boundaries(), beating:
        _, sender = _receive(supervisor)
        for answer in NO_STOP:
            supervisor.sendto(answer, sender)
        for _ in range(5):
            _receive(supervisor)
        assert process_status.stop_asked_by is None
        supervisor.sendto(b'{"token": "secret", "stop": true}', sender)
        while process_status.stop_asked_by is None:
            _receive(supervisor)
        process_status.stop_asked_by = None
        for _ in range(3):
            supervisor.sendto(b'{"token": "secret", "stop": true}', _receive(supervisor)[1])
        assert process_status.stop_asked_by is None, "the first request counts"


def test_without_a_listener_nothing_fails() -> None:
    for host in ("127.0.0.1", "240.0.0.1", "no.such.host.invalid"):
        with heartbeat(ProcessStatus(), WORLD, environ=Channel(host, 9, "secret", 0.01).variables()):
            time.sleep(0.1)


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:port:token", "host:70000:token", "host:0:token", f"{'a' * 70}:9:token", "a..b:9:token"],
)
def test_an_address_that_the_supervisor_cannot_have_set_is_refused(address: str) -> None:
    with pytest.raises(MachineError, match=r"SPECIALM_HEARTBEAT=.*host:port:token"):
        Channel.of({"SPECIALM_HEARTBEAT": address})
    assert Channel.of({}) is None


@pytest.mark.parametrize("seconds", ["", "x", "0", "-1", "nan", "inf", "1e999"])
def test_the_interval_must_be_a_number_of_seconds(seconds: str) -> None:
    with pytest.raises(MachineError, match="SPECIALM_HEARTBEAT_SECONDS="):
        Channel.of({"SPECIALM_HEARTBEAT": "host:9:token", "SPECIALM_HEARTBEAT_SECONDS": seconds})


def test_a_stuck_main_thread_is_reported_with_its_line(supervisor: socket.socket) -> None:
    """And a request to stop wakes it from there."""
    program = """
import time
from megatron_specialm.base.environment import ALONE
from megatron_specialm.base.reporting import heartbeat
from megatron_specialm.base.process_status import ProcessStatus
def stuck():
    time.sleep(600)
process_status = ProcessStatus()
with process_status.stop_on_signals(), heartbeat(process_status, ALONE):
    stuck()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True,
        env={**os.environ, **_environ(supervisor), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        while "stuck" not in (_receive(supervisor)[0]["stack"] or [""])[-1]:
            pass
        supervisor.sendto(b'{"token": "secret", "stop": true}', _receive(supervisor)[1])
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "Stopped: stopped by SIGTERM while starting" in errors


def test_at_once_or_at_the_boundary() -> None:
    process_status = ProcessStatus()
    with process_status.stop_on_signals():
        with process_status.at_step_boundaries():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert process_status.stop_asked_by == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)  # the ending is not disturbed
        with pytest.raises(Stopped, match="SIGUSR1"):
            process_status.stop_if_asked()
    fresh = ProcessStatus()
    fresh.begin("tokens/generic")
    with fresh.stop_on_signals(), pytest.raises(Stopped, match="SIGTERM while tokens/generic"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
