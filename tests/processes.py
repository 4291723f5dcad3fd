"""Several processes that do the same at the same time."""

import multiprocessing
from collections.abc import Callable


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
