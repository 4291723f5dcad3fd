"""Profiles, memory snapshots, and control of Python's garbage collection (`Runtime` of `config/training.py`)."""

import contextlib
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_specialm.base.integrity import PROFILES
from megatron_specialm.config.training import Runtime

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Run Python's garbage collector only on `gc.collect()`, and exempt all objects that exist now, unless the process has
    exempted its imports. So no rank pauses at a moment of its own while the others wait, and a collection is short."""
    was_enabled, has_exempted = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    if not has_exempted:
        gc.freeze()
    try:
        yield
    finally:
        if not has_exempted:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def observed(step: int, settings: Runtime, folder: Path, *, rank: int) -> Iterator[None]:
    """Profile a step (counted from 1) or record its allocations, if the settings ask for it."""
    path = folder / PROFILES / f"step_{step:07d}-rank_{rank:05d}"
    with contextlib.ExitStack() as stack:
        if step in settings.profile_steps:
            stack.enter_context(_profiled(path.with_suffix(".json.gz")))
        if step in settings.memory_snapshot_steps:
            stack.enter_context(_with_memory_snapshot(path.with_suffix(".pickle")))
        yield


@contextlib.contextmanager
def _profiled(path: Path) -> Iterator[None]:
    with torch.profiler.profile(record_shapes=True) as profile:
        yield
    path.parent.mkdir(exist_ok=True)
    profile.export_chrome_trace(str(path))
    logger.info("wrote %s", path)


@contextlib.contextmanager
def _with_memory_snapshot(path: Path) -> Iterator[None]:
    if not torch.cuda.is_available():
        logger.warning("runtime.memory_snapshot_steps: no %s is written: this process has no GPU", path.name)
        yield
        return
    torch.cuda.memory._record_memory_history()
    try:
        yield
    finally:  # also, and above all, when the step runs out of memory
        path.parent.mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        logger.info("wrote %s", path)
        torch.cuda.memory._record_memory_history(enabled=None)
