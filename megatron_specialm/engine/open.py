"""How trainings, trials, parity and tools get an engine: from the package beside this file that the layout's `engine` names.

A package `engine/NAME/` has a module `open` with a function `open_engine` of the same arguments.
"""

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch

from megatron_specialm.base.environment import ALONE, World
from megatron_specialm.config.training import Adam
from megatron_specialm.engine.megatron.process_groups import process_group
from megatron_specialm.engine.objective import Objective, cross_entropy
from megatron_specialm.engine.protocol import Engine
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt


def open_engine(
    setup: Setup,
    world: World,
    *,
    optimizer: Adam,
    initialize: Callable[[Gpt], object],
    objective: Objective = cross_entropy,
    teacher_weights: Mapping[str, torch.Tensor] | None = None,
    threads: int = 1,
    timeout_seconds: float = 600,
) -> AbstractContextManager[Engine]:
    """Join the other processes in the process groups of a layout, and build an engine there; leave them on the way out.

    Args:
        setup: model, layout, precision and batch. With a `teacher`, that runs beside the model in training.
        initialize: gives the model its first weights.
        teacher_weights: canonical ones, where the setup has a teacher.
        threads: of this process, for computing on a CPU.
        timeout_seconds: how long a collective may take.

    Raises:
        MachineError: not all processes come, or the layout is for another number of processes.
        ConfigError: the teacher cannot run in this layout, or has another vocabulary.
    """
    package = importlib.import_module(f"megatron_specialm.engine.{setup.parallel.engine}.open")
    opened: AbstractContextManager[Engine] = package.open_engine(
        setup,
        world,
        optimizer=optimizer,
        initialize=initialize,
        objective=objective,
        teacher_weights=teacher_weights,
        threads=threads,
        timeout_seconds=timeout_seconds,
    )
    return opened


def single_process(*, threads: int = 1) -> AbstractContextManager[None]:
    """The process groups that a `Gpt` needs which is whole on this process and computes without an engine."""
    return process_group(ALONE, threads=threads)
