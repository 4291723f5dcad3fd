"""How trainings, trials, parity and tools get an engine: from the package beside this file that the layout's `engine` names.

A package `engine/NAME/` has a module `open` with two functions: `process_group`, a context manager, with the arguments of
`engine/process_groups.py`, and `build_engine`, with those of the one here.
"""

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from megatron_specialm.base.environment import ALONE, World
from megatron_specialm.config.training import Adam
from megatron_specialm.engine.objective import Objective, cross_entropy
from megatron_specialm.engine.process_groups import process_group
from megatron_specialm.engine.protocol import Engine
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt


@contextlib.contextmanager
def open_engine(
    setup: Setup,
    world: World,
    *,
    optimizer: Adam,
    initialize: Callable[[Gpt], object],
    objective: Objective = cross_entropy,
    teacher_weights: Mapping[str, torch.Tensor] | None = None,
    threads: int = 1,
) -> Iterator[Engine]:
    """Join the other processes in the process groups of a layout, and build an engine there; leave them on the way out.

    Args:
        threads: of this process, for computing on a CPU.

    For the others, and more errors, see `build_engine`.

    Raises:
        MachineError: not all processes come, or the layout is for another number of processes.
    """
    with _package(setup).process_group(
        world, parallel=setup.parallel, expert_tensor_parallel=setup.expert_tensor_parallel, threads=threads
    ):
        yield build_engine(
            setup, optimizer=optimizer, initialize=initialize, objective=objective, teacher_weights=teacher_weights
        )


def build_engine(
    setup: Setup,
    *,
    optimizer: Adam,
    initialize: Callable[[Gpt], object],
    objective: Objective = cross_entropy,
    teacher_weights: Mapping[str, torch.Tensor] | None = None,
) -> Engine:
    """An engine in process groups that are open. There may be several in the same ones, to be compared.

    Args:
        setup: model, layout, precision and batch; with a `teacher`, a model that runs beside the other in training.
        initialize: gives the model its first weights.
        teacher_weights: canonical ones, where the setup has a teacher.

    Raises:
        ConfigError: the teacher cannot run in this layout, or has another vocabulary.
    """
    gc.collect()  # an engine is in a reference cycle: free that of an earlier training before this one takes memory
    engine: Engine = _package(setup).build_engine(
        setup, optimizer=optimizer, initialize=initialize, objective=objective, teacher_weights=teacher_weights
    )
    return engine


def single_process(*, threads: int = 1) -> contextlib.AbstractContextManager[None]:
    """The process groups that a `Gpt` needs which is whole on this process and computes without an engine."""
    return process_group(ALONE, threads=threads)


def _package(setup: Setup) -> Any:
    return importlib.import_module(f"megatron_specialm.engine.{setup.parallel.engine}.open")
