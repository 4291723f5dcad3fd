"""Ranks of these tests are forked from one server."""

from multiprocessing import forkserver

import pytest

from tests.processes import rank_context


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """Start it with the imports of all of them, whichever test comes first."""
    rank_context()
    forkserver.ensure_running()
