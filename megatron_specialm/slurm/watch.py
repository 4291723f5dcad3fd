"""Show a pipeline's status once, or until no job is left."""

import contextlib
import json
import sys
import time

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.output import nobody_reads
from megatron_specialm.base.printing import say
from megatron_specialm.base.terminal import console
from megatron_specialm.config.schema import Pipeline
from megatron_specialm.slurm.status import Status, read_status
from megatron_specialm.slurm.status_table import status_json, status_view


def show_status(pipeline: Pipeline, *, as_json: bool) -> None:
    """Print it once.

    Raises:
        ArtifactError: a record in the run folder is damaged.
        MachineError: Slurm does not answer.
    """
    _show(read_status(pipeline), as_json=as_json)


def watch_status(pipeline: Pipeline, *, as_json: bool, seconds: float) -> None:
    """Look every so many seconds until no job is queued or running, or Ctrl-C. A terminal shows the newest look alone.
    A controller that does not answer is told and asked again.

    Raises:
        ArtifactError: a record in the run folder is damaged.
    """
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                status = read_status(pipeline)
            except MachineError as error:
                say(f"{error}; looking again", error=True)
            else:
                if not as_json and sys.stdout.isatty():
                    console().clear()
                _show(status, as_json=as_json)
                if not status.is_live or nobody_reads():
                    return
            time.sleep(seconds)


def _show(status: Status, *, as_json: bool) -> None:
    if as_json:
        say(json.dumps(status_json(status)))
    else:
        console().print(status_view(status))
