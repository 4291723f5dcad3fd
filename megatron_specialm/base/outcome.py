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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_specialm.base.environment import World, node_name
from megatron_specialm.base.errors import SpecialmError, Stopped
from megatron_specialm.base.files import write_json
from megatron_specialm.base.process_status import ProcessStatus

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """The content of `stopped.json`: the step of a training that was saved, if it is one."""

    step: int | None


@dataclass(frozen=True)
class Failure:
    """The content of an `error-<rank>.json`. `time` is Unix time."""

    error: str
    exit_code: int
    step: int | None
    node: str
    time: float


@contextlib.contextmanager
def recorded_outcome(
    world: World, process_status: ProcessStatus, *, environ: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Leave how what is within ends. Errors pass through."""
    if "SPECIALM_ATTEMPT" not in environ:
        yield
        return
    folder = Path(environ["SPECIALM_ATTEMPT"])
    try:
        yield
    except Stopped:
        if world.is_first:
            _leave(folder / "stopped.json", asdict(Saved(process_status.step)))
        raise
    except (Exception, KeyboardInterrupt) as error:
        _leave(folder / f"error-{world.rank}.json", asdict(_failure(error, step=process_status.step)))
        raise
    if world.is_first:
        _leave(folder / "finished.json", {"time": time.time()})


def _failure(error: BaseException, *, step: int | None) -> Failure:
    if isinstance(error, SpecialmError):
        what, exit_code = str(error), error.exit_code
    else:
        what, exit_code = f"{type(error).__name__}: {error}", 1
    return Failure(what, exit_code, step, node_name(), time.time())


def _leave(path: Path, value: Mapping[str, Any]) -> None:
    """A disk that is full must not hide what this is about."""
    try:
        write_json(path, value)
    except OSError as error:
        logger.warning("%s: cannot be written: %s", path, error)
