"""Programs of other systems' own code. Each starts its ranks by `run_ranks`."""

import importlib
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

DEEPSPEED = ("deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo")
MEGATRON = (
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron_specialm.model.cpu",
    "torch._dynamo",
)


def run_ranks(rank: Callable[..., None], *arguments: Any, processes: int, imports: tuple[str, ...]) -> None:
    """Call a function with its rank and arguments in so many processes, which are forked after the imports: importing takes
    longer than most of what they do."""
    for name in imports:
        importlib.import_module(name)
    mp.start_processes(rank, args=arguments, nprocs=processes, start_method="fork")
