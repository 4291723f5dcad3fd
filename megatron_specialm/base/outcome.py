"""What a rank leaves of its end, for the supervisor: launchers' exit codes say too little, and srun's can be 0 after a node
was lost.

    SPECIALM_ATTEMPT=FOLDER        where to; without it nothing is left
    FOLDER/finished.json           by the first rank: all is done
    FOLDER/stopped.json            by the first rank: it was asked to stop, and at which step it did
    FOLDER/error-<rank>.json       by any rank that fails
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_specialm.base.environment import World, node_name
from megatron_specialm.base.errors import SpecialmError, Stopped
from megatron_specialm.base.files import write_json
from megatron_specialm.base.lifeline import Lifeline

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def recorded_outcome(world: World, lifeline: Lifeline, *, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Leave how what is within ends. Errors pass through."""
    if "SPECIALM_ATTEMPT" not in environ:
        yield
        return
    folder = Path(environ["SPECIALM_ATTEMPT"])
    try:
        yield
    except Stopped:
        if world.is_first:
            _leave(folder / "stopped.json", {"step": lifeline.step})
        raise
    except (Exception, KeyboardInterrupt) as error:
        _leave(folder / f"error-{world.rank}.json", _described(error, step=lifeline.step))
        raise
    if world.is_first:
        _leave(folder / "finished.json", {"time": time.time()})


def _described(error: BaseException, *, step: int | None) -> dict[str, Any]:
    if isinstance(error, SpecialmError):
        what, exit_code = str(error), error.exit_code
    else:
        what, exit_code = f"{type(error).__name__}: {error}", 1
    return {"error": what, "exit_code": exit_code, "step": step, "node": node_name(), "time": time.time()}


def _leave(path: Path, value: Mapping[str, Any]) -> None:
    """A disk that is full must not hide what this is about."""
    try:
        write_json(path, value)
    except OSError as error:
        logger.warning("%s: cannot be written: %s", path, error)
