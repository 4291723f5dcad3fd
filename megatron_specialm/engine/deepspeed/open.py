"""What `engine/open.py` asks of this engine: process groups, and an engine in them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch

from megatron_specialm.base.environment import World
from megatron_specialm.config.parallel import DeepSpeedConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.engine import process_groups
from megatron_specialm.engine.deepspeed.engine import DeepSpeedEngine
from megatron_specialm.engine.deepspeed.moe import DeepSpeedExperts
from megatron_specialm.engine.deepspeed.package import global_state
from megatron_specialm.engine.gpt_engine import build_models
from megatron_specialm.engine.objective import Objective
from megatron_specialm.estimate.setup import Setup
from megatron_specialm.model.gpt import Gpt


@contextlib.contextmanager
def process_group(
    world: World,
    *,
    parallel: DeepSpeedConfig,
    expert_tensor_parallel: int | None = None,
    threads: int = 1,
    timeout_seconds: float = 600,
) -> Iterator[None]:
    """See `engine/process_groups.py`."""
    with (
        process_groups.process_group(
            world,
            parallel=parallel,
            expert_tensor_parallel=expert_tensor_parallel,
            threads=threads,
            timeout_seconds=timeout_seconds,
        ),
        global_state(process_groups.device_of(world)),
    ):
        yield


def build_engine(
    setup: Setup,
    *,
    optimizer: Adam,
    initialize: Callable[[Gpt], object],
    objective: Objective,
    teacher_weights: Mapping[str, torch.Tensor] | None,
) -> DeepSpeedEngine:
    """See `engine/open.py`."""
    model, teacher = build_models(setup, initialize, teacher_weights, experts=DeepSpeedExperts)
    return DeepSpeedEngine(model, setup=setup, optimizer=optimizer, objective=objective, teacher=teacher)
