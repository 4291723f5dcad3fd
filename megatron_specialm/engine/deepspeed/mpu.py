"""Megatron-Core's process groups, under the names by which DeepSpeed asks for them."""

import torch.distributed as dist
from megatron.core import parallel_state


class ModelParallelUnit:
    """The `mpu` of `deepspeed.initialize`. Without pipeline stages, the model-parallel group is the tensor-parallel one.

    DeepSpeed looks with `hasattr` for names with `sequence_parallel`, which mean its own: there must be none.
    """

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """The global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
