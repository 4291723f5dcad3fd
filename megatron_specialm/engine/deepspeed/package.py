"""The import of DeepSpeed, and its global state."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from megatron_specialm.base.packages import import_package
from megatron_specialm.engine.deepspeed.mpu import ModelParallelUnit
from megatron_specialm.model.cpu import import_uncompiled


def deepspeed_module(name: str) -> ModuleType:
    """Import a module of DeepSpeed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it warns if it has to find out
    module = import_package(name)
    vars(import_package("deepspeed.ops"))[
        "__compatible_ops__"
    ] = {}  # otherwise a CPU's all-reduce is compiled, for a minute
    return module


def initialize(model: torch.nn.Module, adam: torch.optim.Optimizer, *, device: torch.device, settings: dict) -> Any:
    """DeepSpeed's engine of a model, in the process groups that are open. No kernel is built, and MPI is not asked.

    Args:
        settings: DeepSpeed's config.
    """
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # it calls functions renamed in 2.13
    if not torch.cuda.is_available():
        with contextlib.suppress(ImportError):  # of versions without Muon; ZeRO asks whether the optimizer is one
            import_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer")
    engine, *_ = deepspeed_module("deepspeed").initialize(
        SimpleNamespace(device_rank=device.index or 0),
        model=model,
        optimizer=adam,
        mpu=ModelParallelUnit,
        config=settings,
    )
    return engine


@contextlib.contextmanager
def global_state(device: torch.device) -> Iterator[None]:
    """Within, DeepSpeed finds the variable that it demands; left in place, it would pass for a launcher's. On the way out,
    DeepSpeed forgets the process groups, which a later training in this process makes anew."""
    given = os.environ.get("LOCAL_RANK")
    if "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ:
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    try:
        yield
    finally:
        if given is None:
            os.environ.pop("LOCAL_RANK", None)
        if "deepspeed" in sys.modules:
            import_package("deepspeed.utils.groups")._release_process_group_references()
            import_package("deepspeed.comm.comm").cdb = None  # type: ignore[attr-defined]
