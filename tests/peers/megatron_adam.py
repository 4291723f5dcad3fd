"""Megatron-core's optimizers on four gloo processes: `python -m tests.peers.megatron_adam save|load FOLDER`.

`save` makes three updates and writes, each in `iter_0000003` and as `torch_dist`:
    FOLDER/plain          fp32 and Adam, at TP2 x PP2
    FOLDER/distributed    bf16 and the distributed optimizer, `fully_reshardable`, at TP2 x DP2
    FOLDER/buffers        the same, `dp_reshardable`: the optimizer's buffers as they are
`load` reads FOLDER/plain-written at TP2 x PP2 and FOLDER/distributed-written at PP2 x DP2, each into a model and an optimizer
with other values, and saves what these then hold as FOLDER/plain-again and FOLDER/distributed-again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.peers import MEGATRON, run_ranks
from tests.peers.megatron import STEP, _save_distributed, build_model

RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
BUFFERS = {"distrib_optim_sharding_type": "dp_reshardable"}
# What Megatron-LM calls the model of `build_model`.
SETTINGS = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
    "group_query_attention": True, "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False,
    "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True, "vocab_size": 96,
    "max_position_embeddings": 16,
}  # fmt: skip


class FusedAdam(torch.optim.Optimizer):
    """AdamW that counts its updates per group, as Transformer Engine's and apex's, which the distributed optimizer expects."""

    def __init__(self, params: Any, *, adam_w_mode: bool = True, **settings: Any) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = count = group.get("step", 0) + 1
            rate, (one, two) = group["lr"], group["betas"]
            for parameter in (own for own in group["params"] if own.grad is not None):
                state, gradient = self.state[parameter], parameter.grad
                for moment in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(moment, torch.zeros_like(parameter))
                state["exp_avg"].lerp_(gradient, 1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(gradient, gradient, value=1 - two)
                scale = (state["exp_avg_sq"] / (1 - two**count)).sqrt() + group["eps"]
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"] / (1 - one**count), scale, value=-rate)


def _take_fused_adam() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.USING_PYTORCH_OPTIMIZER = False
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True


def _rank(rank: int, action: str, folder: Path) -> None:
    from megatron_specialm.model import cpu

    cpu.install()
    torch.cuda.synchronize = lambda *_: None  # dist_checkpointing calls these on any machine
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{action}", rank=rank, world_size=4)
    {"save": _save, "load": _load}[action](folder)
    dist.barrier()
    dist.destroy_process_group()


def _layout(tensor: int, pipeline: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model_parallel_cuda_manual_seed(0)


def _training(*, distributed: bool) -> tuple[torch.nn.Module, Any]:
    """A model and its optimizer after three updates."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_specialm.model.cpu import cuda_type_names

    if distributed:
        _take_fused_adam()
    torch.manual_seed(parallel_state.get_tensor_model_parallel_rank())  # data-parallel copies are equal
    dtype = torch.bfloat16 if distributed else torch.float32
    model = build_model(bf16=distributed, params_dtype=dtype, pipeline_dtype=dtype).to(dtype)
    buffers = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, buffers, model)
    config = OptimizerConfig(
        optimizer="adam", lr=0.01, adam_beta1=0.8, clip_grad=0.0, bf16=distributed, params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )  # fmt: skip
    with cuda_type_names():
        optimizer = get_megatron_optimizer(config, [wrapped])
    for update in range(STEP):
        for parameter in model.parameters():
            values = torch.linspace(-1 - update, 1, parameter.numel())  # of norms, equal on all ranks
            parameter.main_grad.copy_(values.view_as(parameter))
        optimizer.step()
    return model, optimizer


def _content(model: torch.nn.Module, optimizer: Any, metadata: dict, **loading: Any) -> dict[str, Any]:
    weights = model.sharded_state_dict(metadata=dict(metadata))
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, metadata=dict(metadata), **loading)}


def _save(folder: Path) -> None:
    for layout, forms in (((2, 2), {"plain": {}}), ((2, 1), {"distributed": RESHARDABLE, "buffers": BUFFERS})):
        _layout(*layout)
        model, optimizer = _training(distributed="plain" not in forms)
        common = {"args": argparse.Namespace(**SETTINGS), "checkpoint_version": 3.0, "iteration": STEP}
        for form, metadata in forms.items():
            _save_distributed(folder / form, {**common, **_content(model, optimizer, metadata)})


def _load(folder: Path) -> None:
    from megatron.core import dist_checkpointing

    for layout, form, metadata in (((2, 2), "plain", {}), ((1, 2), "distributed", RESHARDABLE)):
        _layout(*layout)
        model, optimizer = _training(distributed=form == "distributed")
        place = str(folder / f"{form}-written" / f"iter_{STEP:07d}")
        loaded = dist_checkpointing.load(_content(model, optimizer, metadata, is_loading=True), place)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        common = {"args": argparse.Namespace(**SETTINGS), "checkpoint_version": 3.0, "iteration": STEP}
        _save_distributed(folder / f"{form}-again", {**common, **_content(model, optimizer, metadata)})


if __name__ == "__main__":
    run_ranks(_rank, sys.argv[1], Path(sys.argv[2]).resolve(), processes=4, imports=MEGATRON)
