"""One process has nobody to talk to: it keeps no threads for it."""

import os

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_specialm.base.control_group import ControlGroup
from megatron_specialm.base.environment import ALONE
from megatron_specialm.config.model import ModelConfig
from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Optimizer
from megatron_specialm.engine.megatron.engine import MegatronEngine
from megatron_specialm.engine.process_groups import process_group
from megatron_specialm.model.gpt import Gpt


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_one_process_has_two_groups_and_few_threads(neox: ModelConfig) -> None:
    before, create_group = _threads(), parallel_state.create_group
    with process_group(ALONE):
        model = Gpt(neox, vocabulary_size=100, context_length=16)
        MegatronEngine(model, parallel=ParallelConfig(), optimizer=Optimizer(), micro_batch_size=1)
        groups = [ControlGroup.open() for _ in range(2)]  # a training's: for its loop, and for saving
        assert dist.distributed_c10d._world.pg_map.keys() == {
            dist.group.WORLD,
            parallel_state.get_data_parallel_group(),
        }
        assert parallel_state.get_tensor_model_parallel_group() is parallel_state.get_data_parallel_group_gloo()
        assert _threads() - before <= 10, "three per group, and the store's"
        assert all(one.is_first and one.all_gather("alone") == ["alone"] for one in groups)
    assert parallel_state.create_group is create_group and not dist.is_initialized()
