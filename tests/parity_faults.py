"""Faults to plant into one process of a parity run, each what a real bug of this field was like."""

import functools
import importlib
from pathlib import Path

import torch

from megatron_specialm.base.environment import World
from megatron_specialm.parity.case import ParityCase
from megatron_specialm.parity.rank import measure


def no_forward_reduction(case: ParityCase, world: World, folder: Path) -> None:
    """Row-parallel linears do not sum their outputs over the tensor-parallel processes."""
    from megatron.core.tensor_parallel import mappings

    mappings._reduce = lambda tensor, *_, **__: tensor
    measure(case, world, folder)


def no_backward_reduction(case: ParityCase, world: World, folder: Path) -> None:
    """Column-parallel linears do not sum the gradients of their inputs."""
    from megatron.core.tensor_parallel import layers

    healthy = layers.linear_with_grad_accumulation_and_async_allreduce

    @functools.wraps(healthy)
    def without(*args, **settings) -> torch.Tensor:
        return healthy(*args, **{**settings, "allreduce_dgrad": False})

    layers.linear_with_grad_accumulation_and_async_allreduce = without
    measure(case, world, folder)


def no_norm_reduction(case: ParityCase, world: World, folder: Path) -> None:
    """Under sequence parallelism the norms' gradients stay those of each process's own positions."""
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_non_tensor_model_parallel_grads = lambda *_, **__: None
    measure(case, world, folder)


def no_embedding_reduction(case: ParityCase, world: World, folder: Path) -> None:
    """The two copies of tied embeddings keep the gradients of their own pipeline stages."""
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    module._allreduce_word_embedding_grads = lambda *_, **__: None
    measure(case, world, folder)


def replicated_counted_twice(case: ParityCase, world: World, folder: Path) -> None:
    """Every tensor-parallel process counts the weights that all of them hold."""
    from megatron.core import tensor_parallel

    tensor_parallel.param_is_not_tensor_parallel_duplicate = lambda *_, **__: True
    measure(case, world, folder)


def scaled_by_copies(case: ParityCase, world: World, folder: Path) -> None:
    """Gradients are summed over the copies where the mean was divided out already."""
    from megatron_specialm.engine.megatron import engine as megatron_engine

    healthy = megatron_engine.finalize_model_grads

    def scaled(chunks, *args, **kwargs) -> None:
        healthy(chunks, *args, **kwargs)
        for chunk in chunks:
            chunk.scale_gradients(float(case.parallel.data_parallel))

    megatron_engine.finalize_model_grads = scaled
    measure(case, world, folder)


def batched_interleaving(case: ParityCase, world: World, folder: Path) -> None:
    """Two interleaved stages send each other two tensors in one batch, and take one for the other."""
    from megatron_specialm.model import gpt

    healthy = gpt._pipeline
    gpt._pipeline = lambda *args: {**healthy(*args), "batch_p2p_comm": True, "overlap_p2p_comm": False}
    measure(case, world, folder)


def copies_drift(case: ParityCase, world: World, folder: Path) -> None:
    """Each copy trains on its own, without any sum over them."""
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer

    def silent(tensor: torch.Tensor, *_, group: dist.ProcessGroup | None = None, **__) -> None:
        pass

    view = param_and_grad_buffer.torch
    view.distributed = type("distributed", (), {**vars(dist), "all_reduce": staticmethod(silent)})
    measure(case, world, folder)


def stages_keep_their_codes(case: ParityCase, world: World, folder: Path) -> None:
    """Of the experts' codes, each pipeline stage has the gradient of its own layers."""
    from megatron_specialm.model.derived import _SumOverStages

    _SumOverStages.backward = staticmethod(lambda ctx, gradient: gradient)
    measure(case, world, folder)


def derived_before_gathered(case: ParityCase, world: World, folder: Path) -> None:
    """Weights are derived from parameters that the copies have yet to gather."""
    from megatron_specialm.engine.megatron.engine import MegatronEngine

    MegatronEngine._finish_gathering = lambda _: None
    measure(case, world, folder)


def partial_coefficients(case: ParityCase, world: World, folder: Path) -> None:
    """Each tensor-parallel process has the coefficients' gradient of its own part of the matrices."""
    from megatron_specialm.model import derived

    derived.copy_to_tensor_model_parallel_region = lambda tensor: tensor
    measure(case, world, folder)


def experts_scaled_by_copies(case: ParityCase, world: World, folder: Path) -> None:
    """The gradients of experts are multiplied by the number of processes that the experts are split over."""
    from megatron_specialm.engine.megatron import engine as megatron_engine

    healthy = megatron_engine.finalize_model_grads

    def scaled(chunks, *args, **kwargs) -> None:
        healthy(chunks, *args, **kwargs)
        for chunk in chunks:
            for buffer in chunk.expert_parallel_buffers:
                buffer.scale_gradients(float(case.parallel.expert_parallel))

    megatron_engine.finalize_model_grads = scaled
    measure(case, world, folder)


def experts_not_in_the_norm(case: ParityCase, world: World, folder: Path) -> None:
    """The norm by which gradients are clipped is that of the dense weights."""
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    healthy = MegatronOptimizer.get_main_grads_for_grad_norm

    def dense(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
        experts = all(not getattr(parameter, "allreduce", True) for parameter in optimizer.get_parameters())
        return [] if experts else healthy(optimizer)

    MegatronOptimizer.get_main_grads_for_grad_norm = dense
    measure(case, world, folder)


def aux_loss_of_each_tensor_rank(case: ParityCase, world: World, folder: Path) -> None:
    """Every tensor-parallel process adds the auxiliary losses of all positions."""
    from megatron_specialm.model.router import Router

    healthy = Router._losses
    Router._losses = lambda *args: tuple(loss * case.parallel.tensor_parallel for loss in healthy(*args))
    measure(case, world, folder)


def no_expert_bias(case: ParityCase, world: World, folder: Path) -> None:
    """The last bias of an expert, which its linear returns beside the output, is not added."""
    from megatron.core.tensor_parallel import RowParallelLinear

    healthy = RowParallelLinear.forward

    def without(linear: RowParallelLinear, hidden: torch.Tensor) -> tuple:
        output, bias = healthy(linear, hidden)
        return output, None if linear.is_expert else bias

    RowParallelLinear.forward = without
    measure(case, world, folder)


def equal_experts(case: ParityCase, world: World, folder: Path) -> None:
    """All experts of a layer start as copies of the first."""
    from megatron_specialm.model.gpt import Gpt

    healthy = Gpt.load

    def with_copies(model: Gpt, tensors: dict[str, torch.Tensor]) -> None:
        for name, spec in model.specs.items():
            if spec.is_expert:
                tensors[name] = tensors[name][:1].expand(spec.shape)
        healthy(model, tensors)

    Gpt.load = with_copies
    measure(case, world, folder)


def same_experts_on_all(case: ParityCase, world: World, folder: Path) -> None:
    """Every process loads the experts of the first."""
    from megatron_specialm.model.gpt import Gpt
    from megatron_specialm.model.moe import MegatronExperts

    load, place = Gpt.load, MegatronExperts.place

    def of_the_first(experts: MegatronExperts, name: str) -> tuple[str, int | None]:
        canonical, expert = place(experts, name)
        return canonical, None if expert is None else expert % experts.num_local_experts

    def with_the_same(model: Gpt, tensors: dict[str, torch.Tensor]) -> None:
        MegatronExperts.place = of_the_first
        load(model, tensors)
        MegatronExperts.place = place

    Gpt.load = with_the_same
    measure(case, world, folder)


def attention_leaks_into_the_next_window(case: ParityCase, world: World, folder: Path) -> None:
    """A packed sequence is attended to as if it were one window."""
    from megatron_specialm.model.attention import FusedCoreAttention

    healthy = FusedCoreAttention.forward

    def of_the_whole(attention: FusedCoreAttention, *qkv: torch.Tensor, packed_seq_params=None, **_) -> torch.Tensor:
        return healthy(attention, *(part[:, None] for part in qkv[:3]), None)

    FusedCoreAttention.forward = of_the_whole
    measure(case, world, folder)


def windows_end_a_token_late(case: ParityCase, world: World, folder: Path) -> None:
    """The first token of each window of a packed sequence is taken for the last one of the window before."""
    from megatron_specialm.model import gpt

    healthy = gpt.packed_windows

    def late(lengths, **settings) -> object:
        return healthy([lengths[0] + 1, *lengths[1:-1], lengths[-1] - 1] if lengths[1:] else lengths, **settings)

    gpt.packed_windows = late
    measure(case, world, folder)
