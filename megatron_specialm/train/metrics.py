"""The record of a training: `metrics.jsonl` for programs, TensorBoard and Weights & Biases for people who use them.

Every attempt (a start or a restart) begins with its own record. `tokens` excludes padding, `slots` includes it; `fill` is their
ratio. The cost of a training, lost steps included, is in `work.json` (train/work.py).
"""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from megatron_specialm.base.errors import MachineError, Stopped
from megatron_specialm.base.packages import import_package


class Metrics:
    """Appends records to `metrics.jsonl` in a folder, and scalars to TensorBoard and W&B if enabled. Leaving the context closes
    all of them and reports to W&B whether training failed."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False, wandb_project: str | None = None) -> None:
        with ExitStack() as closing:
            self._file = closing.enter_context(_open_records(folder / "metrics.jsonl"))
            closing.callback(lambda: os.fsync(self._file.fileno()))
            self._board = _tensorboard(folder) if tensorboard else None
            if self._board:
                closing.callback(self._board.close)
            self._wandb: Any = _wandb(folder, wandb_project) if wandb_project else None
            if self._wandb:
                closing.push(self._finish_wandb)
            self.write(event="start", step=step)
            self._closing = closing.pop_all()

    def write(self, **record: Any) -> None:
        """Append one record with the time and flush it."""
        self._file.write(json.dumps({"time": time.time(), **record}) + "\n")
        self._file.flush()
        scalars = {name: value for name, value in record.items() if isinstance(value, float)}
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb and scalars:
            self._wandb.log(scalars, step=record["step"])

    def close(self) -> None:
        """Flush everything to disk."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.__exit__(kind, error, trace)

    def _finish_wandb(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and not issubclass(kind, Stopped)
        self._wandb.finish(exit_code=int(failed))


def _open_records(path: Path) -> IO[str]:
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # the last attempt was killed while writing
    file = path.open("a", encoding="utf-8")
    file.write("\n" if torn else "")
    return file


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MachineError(
            "tensorboard: true, but it is not installed: pip install 'megatron_specialm[tensorboard]'"
        ) from None
    return SummaryWriter(folder / "tensorboard")


def _wandb(folder: Path, project: str) -> Any:
    try:
        wandb = import_package("wandb")
    except ImportError:
        raise MachineError(
            "wandb_project is set, but wandb is not installed: pip install 'megatron_specialm[wandb]'"
        ) from None
    return wandb.init(project=project, dir=folder, name=f"{folder.parent.name}/{folder.name}", resume="allow")
