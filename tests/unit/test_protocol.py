"""The protocol between supervisor and ranks stands in one module, and both sides understand each other's messages."""

import ast
from pathlib import Path

import pytest

from megatron_specialm.base import protocol
from megatron_specialm.base.protocol import Channel, Heartbeat, asks_to_stop, encode_answer, error_path
from tests.conftest import ROOT

PACKAGE = ROOT / "megatron_specialm"
NAMES = (
    protocol.LAUNCHER, protocol.HEARTBEAT, protocol.HEARTBEAT_SECONDS, protocol.ATTEMPT, protocol.FENCING_TOKEN,
    protocol.FINISHED, protocol.STOPPED, "error-",
)  # fmt: skip


def _texts(path: Path) -> set[str]:
    """The string constants of a module, without docstrings."""
    tree = ast.parse(path.read_text())
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in statements)
    return {node.value for node in constants if isinstance(node.value, str)}


def test_no_other_module_spells_a_name_of_the_protocol() -> None:
    for path in PACKAGE.rglob("*.py"):
        found = {name for name in NAMES for text in _texts(path) if name in text}
        assert not found or path.name == "protocol.py", f"{path.relative_to(PACKAGE)} spells {found}"


@pytest.mark.parametrize("host", ["node1", "10.0.0.1", "fe80::1"])
def test_a_rank_finds_the_channel_that_the_supervisor_names(host: str) -> None:
    channel = Channel(host, 40_000, "secret", 2.5)
    assert Channel.of(channel.variables()) == channel


def test_a_heartbeat_arrives_as_it_was_sent() -> None:
    beat = Heartbeat(
        token="t", rank=3, node="n1", activity="日本語 \x1b", progress=None, step=2**62, stack=("a:1 f", "b:2 g")
    )
    assert Heartbeat.decode(beat.encode(), token="t", ranks=4) == beat
    assert Heartbeat.decode(beat.encode(), token="t", ranks=3) is None, "no such rank was launched"
    largest = Heartbeat(
        token="t" * 32, rank=2**63 - 1, node="\0" * protocol.NAME_CHARACTERS, activity="\0" * protocol.NAME_CHARACTERS,
        progress=2**63 - 1, step=2**63 - 1, stack=("\0" * protocol.FRAME_CHARACTERS,) * protocol.FRAMES,
    )  # fmt: skip
    assert len(largest.encode()) < protocol.DATAGRAM_BYTES


def test_an_answer_asks_to_stop_or_not() -> None:
    assert asks_to_stop(encode_answer("t", stop=True), "t")
    assert not asks_to_stop(encode_answer("t", stop=False), "t")
    assert not asks_to_stop(encode_answer("other", stop=True), "t")


def test_errors_of_ranks_are_found_by_their_pattern(tmp_path: Path) -> None:
    for rank in (0, 12):
        error_path(tmp_path, rank).touch()
    assert {path.name for path in tmp_path.glob(protocol.ERRORS)} == {"error-0.json", "error-12.json"}
