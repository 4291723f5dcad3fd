"""Several processes that do the same at the same time, and where they meet."""

import contextlib
import multiprocessing
import random
import socket
from collections.abc import Callable
from multiprocessing.context import BaseContext

from megatron_specialm.config.load import KINDS
from megatron_specialm.parity.compare import MODULES
from megatron_specialm.run.processes import worker_context


def together(act: Callable[[], None], *, processes: int = 4) -> None:
    """Have so many processes call a function at once; none of them fails."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(processes)

    def begin() -> None:
        barrier.wait()
        act()

    started = [context.Process(target=begin) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * processes


def rank_context() -> BaseContext:
    """How tests start ranks and tasks: forked from one server per test process, which has imported what any of them needs."""
    stages = [f"megatron_specialm.stages.{kind}" for kind in KINDS]
    return worker_context([*MODULES, *stages, "tests.training"], threads=1)


def free_port() -> int:
    """A port of this machine that nothing uses, below those that the kernel gives to anybody: nobody takes it in between."""
    for port in random.SystemRandom().sample(range(24_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
