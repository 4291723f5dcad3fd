"""What `engine/open.py` asks of this engine: process groups, and an engine in them."""

from collections.abc import Callable, Mapping

import torch

from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.engine.gpt_engine import build_models
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.objective import Objective
from megatron_specialm.engine.process_groups import process_group
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt

__all__ = ["build_engine", "process_group"]


def build_engine(
    setup: Setup,
    *,
    optimizer: Adam,
    initialize: Callable[[Gpt], object],
    objective: Objective,
    teacher_weights: Mapping[str, torch.Tensor] | None,
) -> MegatronEngine:
    """See `engine/open.py`."""
    assert isinstance(setup.parallel, ParallelConfig)
    model, teacher = build_models(setup, initialize, teacher_weights)
    return MegatronEngine(
        model,
        parallel=setup.parallel,
        optimizer=optimizer,
        micro_batch_size=setup.micro_batch_size,
        packing=setup.packing,
        objective=objective,
        teacher=teacher,
    )
