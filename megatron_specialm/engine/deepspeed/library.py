"""The import of DeepSpeed, and its global state."""

import contextlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from megatron_specialm.base.packages import import_package
from megatron_specialm.engine.deepspeed.mpu import ModelParallelUnit


def initialize(model: torch.nn.Module, adam: torch.optim.Optimizer, *, device: torch.device, settings: dict) -> Any:
    """DeepSpeed's engine of a model, in the process groups that are open. No kernel is built, and MPI is not asked.

    Args:
        settings: DeepSpeed's config.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it warns if it has to find out
    deepspeed = import_package("deepspeed")
    import_package("deepspeed.ops").__compatible_ops__ = {}  # otherwise a CPU's all-reduce is compiled, for a minute
    index = device.index or 0
    with _local_rank(index):
        engine, *_ = deepspeed.initialize(
            SimpleNamespace(device_rank=index), model=model, optimizer=adam, mpu=ModelParallelUnit, config=settings
        )
    return engine


@contextlib.contextmanager
def _local_rank(index: int) -> Iterator[None]:
    """With the variable that DeepSpeed demands. Left in place, it would pass for a launcher's."""
    given = os.environ.get("LOCAL_RANK")
    if "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(index))
    try:
        yield
    finally:
        if given is None:
            os.environ.pop("LOCAL_RANK", None)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """On the way out, have DeepSpeed forget the process groups, which a later training in this process makes anew."""
    try:
        yield
    finally:
        if "deepspeed" in sys.modules:
            import_package("deepspeed.utils.groups")._release_process_group_references()
            import_package("deepspeed.comm.comm").cdb = None  # type: ignore[attr-defined]
