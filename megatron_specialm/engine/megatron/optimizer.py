"""Adam over what a process trains, plain or dealt out over the data-parallel copies."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from megatron_specialm.config.parallel import ParallelConfig
from megatron_specialm.config.training import Adam
from megatron_specialm.model.cpu import cuda_type_names
from megatron_specialm.model.gpt import Gpt
from megatron_specialm.model.weights import decays


def build_optimizer(
    chunks: list[DistributedDataParallel], model: Gpt, settings: Adam, parallel: ParallelConfig
) -> ChainedOptimizer:
    """Megatron-Core's optimizer of a model's chunks: one for all weights but those of experts, and one for experts, whose
    gradients are summed over other processes.

    Which weights decay goes by their canonical names (`model/weights.py`). Megatron-Core has a rule of its own, by the
    names that its modules have, and leaves it to its scheduler to apply, which is not used here.
    """
    bf16 = model.chunks[0].config.bf16
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set in MegatronEngine.apply_gradients, at every step
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=0.0,  # `apply_gradients` clips: a step that is not finite must be seen before it is made
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_communication and parallel.distributed_optimizer,
    )
    constant = {weight.parameter for weight in model.weights() if not decays(weight.name)}
    undecayed = ParamKey(predicate=ParamPredicate("undecayed", constant.__contains__))
    with cuda_type_names():
        optimizer = get_megatron_optimizer(config, chunks, {undecayed: {"weight_decay": 0.0}})
    if not torch.cuda.is_available():  # otherwise it is Transformer Engine's or apex's, where there is one
        for group in optimizer.param_groups:
            group["fused"] = True  # torch's own loops over the weights once, not once per operation
    return optimizer
