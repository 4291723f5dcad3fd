"""What `engine/open.py` asks of this engine: process groups, and an engine in them."""

from collections.abc import Callable, Mapping

import torch

from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.megatron.process_groups import process_group
from megatron_specialm.engine.objective import Objective
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
    model, teacher = _build(setup, setup.model), None
    initialize(model)
    if setup.teacher is not None:
        assert teacher_weights is not None
        teacher = _build(setup, setup.teacher)
        teacher.load(teacher_weights)
    return MegatronEngine(
        model,
        parallel=setup.parallel,
        optimizer=optimizer,
        micro_batch_size=setup.micro_batch_size,
        objective=objective,
        teacher=teacher,
    )


def _build(setup: Setup, shape: ModelConfig) -> Gpt:
    return Gpt(
        shape,
        vocabulary_size=setup.vocabulary_size,
        context_length=setup.context_length,
        precision=setup.precision,
        fp8=setup.fp8,
        parallel=setup.parallel,
    )
