"""The record of a run: `metrics.jsonl` for programs, TensorBoard and Weights & Biases for people who use them.

Every attempt (a start or a restart) begins with a record of its own. `tokens` are real ones, of `slots` that padded
windows take; `fill` is their ratio. What a run cost, lost steps included, is in `work.json` (train/work.py).
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_specialm.base.errors import MachineError
from megatron_specialm.base.packages import import_package


class Metrics:
    """Appends records to `metrics.jsonl` of a folder, and scalars to TensorBoard and W&B where asked."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool = False, wandb_project: str | None = None) -> None:
        path = folder / "metrics.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # the last attempt was killed while writing
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n" if torn else "")
        self._board = _tensorboard(folder) if tensorboard else None
        self._wandb = _wandb(folder, wandb_project) if wandb_project else None
        self.write(event="start", step=step)

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
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


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
