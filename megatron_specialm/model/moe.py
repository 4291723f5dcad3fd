"""MoE layers: routed experts, and a dense part beside them.

`MoeFeedForward` stands where a dense layer has its MLP. Its routed experts are built by a `RoutedBuilder`, so that each engine
can have its own; router mathematics, shared expert and residual are the same code for all. Here are Megatron-Core's.

Legend: T positions, B sequences, H hidden size, E experts.
"""

import re
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.nn import functional

from megatron_specialm.config.moe import MixtureOfExperts
from megatron_specialm.model.router import ClusterRouter, Router, router_of

ROUTED = "routed"  # the attribute of `MoeFeedForward`; canonical names do not have it
_EXPERT = re.compile(r"experts\.(?:local_experts\.(\d+)\.)?(linear_fc[12]\.(?:weight|bias))(\d*)")


@dataclass(frozen=True)
class RoutedSettings:
    """What routed experts are built from.

    config: Megatron-Core's, of a dense layer of the model.
    submodules: the layer spec's for experts.
    """

    moe: MixtureOfExperts
    experts: int
    ffn_hidden_size: int
    config: TransformerConfig
    submodules: MoESubmodules


class RoutedExperts(Protocol):
    """The routed experts of a layer, a torch module. Some of the experts may lie on other processes."""

    router: Router | ClusterRouter

    def __call__(self, hidden_TBH: torch.Tensor, routing: torch.Tensor | None) -> torch.Tensor:
        """(T, B, H) -> the weighted sum of each token's experts, (T, B, H). For `routing` see `model/gpt.py`, `forward`."""

    def place(self, name: str) -> tuple[str, int | None]:
        """The canonical name below `mlp.` of one of the module's parameters, and the index among all experts of the layer
        of the expert that it is of."""


RoutedBuilder = Callable[[RoutedSettings], Any]


class MoeFeedForward(MegatronModule):
    """Routed experts, with a shared expert or a residual network beside them if the model has one."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        *,
        moe: MixtureOfExperts,
        experts: int,
        ffn_hidden_size: int,
        build: RoutedBuilder,
    ) -> None:
        super().__init__(config)
        self._moe = moe
        setattr(self, ROUTED, build(RoutedSettings(moe, experts, ffn_hidden_size, config, submodules)))
        dense = submodules.shared_experts.submodules
        if moe.shared_expert is not None:
            self.shared_expert = feed_forward(config, dense, moe.shared_expert)
            self.shared_expert_gate = _replicated(config, 1, bias=False)
        if moe.residual:
            self.residual = feed_forward(config, dense, ffn_hidden_size)
            self.residual_mix = _replicated(config, 2, bias=True)

    def forward(
        self, hidden_TBH: torch.Tensor, padding_mask: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """(T, B, H) -> (T, B, H), and no bias that is still to be added. `padding_mask`, by Megatron-Core's name, is the
        `routing` of `model/gpt.py`."""
        output = getattr(self, ROUTED)(hidden_TBH, padding_mask)
        if self._moe.shared_expert is not None:
            gate = _in_fp32(self.shared_expert_gate, hidden_TBH).sigmoid()
            output = output + (gate * _whole(self.shared_expert, hidden_TBH)).to(output.dtype)
        if self._moe.residual:
            mix = _in_fp32(self.residual_mix, hidden_TBH).softmax(-1)
            output = mix[..., :1] * output + mix[..., 1:] * _whole(self.residual, hidden_TBH)
        return output.to(hidden_TBH.dtype), None

    @property
    def router(self) -> Router | ClusterRouter:
        """The router of the routed experts."""
        routed: RoutedExperts = getattr(self, ROUTED)
        return routed.router

    def place(self, name: str) -> tuple[str, int | None]:
        """The canonical name below `mlp.` of a parameter, and the index of the expert that it is of."""
        module, _, rest = name.partition(".")
        return getattr(self, ROUTED).place(rest) if module == ROUTED else (name, None)


class MegatronExperts(MoELayer):
    """Megatron-Core's routed experts and token dispatchers, with our router.

    On gloo each process gathers the tokens of all (allgather); on NCCL they are sent to their experts (alltoall).
    """

    def __init__(self, settings: RoutedSettings) -> None:
        config = _expert_config(settings)
        super().__init__(
            config,
            replace(settings.submodules, router=partial(self._router, settings), shared_experts=None),
            pg_collection=get_default_pg_collection(),
        )
        for parameter in self.experts.parameters():
            # Gradients are summed over the processes with the same experts, whatever their number. These are never those of
            # the tensor-parallel group, and each process of one counts its own in the norm.
            parameter.allreduce = False
            parameter.sequence_parallel = False
            parameter.tensor_model_parallel = True
        for module in self.experts.modules():
            if hasattr(module, "explicit_expert_comm"):
                # Only the dispatcher communicates. On one process a linear would still call its reduction, which returns a
                # view that the bias cannot be added to.
                module.explicit_expert_comm = True

    @staticmethod
    def _router(settings: RoutedSettings, *, config: TransformerConfig, pg_collection: Any) -> Router | ClusterRouter:
        return router_of(
            settings.moe,
            experts=settings.experts,
            hidden_size=config.hidden_size,
            device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None,
            sequence_parallel=config.sequence_parallel,
            group=pg_collection.tp_cp,
        )

    def forward(self, hidden_TBH: torch.Tensor, routing: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """See `RoutedExperts`."""
        output, _ = super().forward(hidden_TBH, padding_mask=routing)
        return output

    def place(self, name: str) -> tuple[str, int | None]:
        """See `RoutedExperts`."""
        found = _EXPERT.fullmatch(name)
        if found is None:
            return name, None
        sequential, weight, grouped = found.groups()
        return f"experts.{weight}", self.local_expert_indices[int(sequential or grouped)]


def moe_layers(chunks: Any) -> Iterator[tuple[int, MoeFeedForward]]:
    """The MoE layers of a process's chunks, with the number of the layer in the model, from 0."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            if isinstance(layer.mlp, MoeFeedForward):
                yield layer.layer_number - 1, layer.mlp


@dataclass(frozen=True)
class FeedForwardSpec:
    """What builds a `MoeFeedForward`: as Megatron-Core's ModuleSpec, which warns of modules that it does not know."""

    submodules: MoESubmodules
    params: dict[str, Any]
    module: type = MoeFeedForward


def _expert_config(settings: RoutedSettings) -> TransformerConfig:
    """Megatron-Core's config of one layer's experts. Layers may have different numbers of them."""
    config = copy(settings.config)
    config.num_moe_experts = settings.experts
    config.moe_router_topk = settings.moe.top_k
    config.moe_ffn_hidden_size = config.ffn_hidden_size = settings.ffn_hidden_size
    config.expert_model_parallel_size = parallel_state.get_expert_model_parallel_world_size()
    config.expert_tensor_parallel_size = parallel_state.get_expert_tensor_parallel_world_size()
    config.moe_token_dispatcher_type = "alltoall" if torch.cuda.is_available() else "allgather"
    # The router has dropped padding and what is above the capacity. So tokens have different numbers of experts, which
    # dispatchers expect only with this.
    config.moe_expert_capacity_factor = 1.0
    config.bias_dropout_fusion = False  # Transformer Engine's grouped experts refuse it where there are biases
    if not config.gated_linear_unit and config.bias_activation_fusion:  # no fused kernel takes the weights of tokens
        config.bias_activation_fusion = False
        config.activation_func = partial(functional.gelu, approximate="tanh")
    return config


def feed_forward(
    config: TransformerConfig, submodules: MLPSubmodules, size: int, *, group: dist.ProcessGroup | None = None
) -> MLP:
    """A dense network.

    Args:
        group: the processes over which its matrices are split; None for those of tensor parallelism.
    """
    config = copy(config)
    config.ffn_hidden_size = size
    return MLP(config, submodules, tp_group=group, ffn_hidden_size=size)


def _whole(network: MLP, hidden_TBH: torch.Tensor) -> torch.Tensor:
    """A network's output with its last bias."""
    output, bias = network(hidden_TBH)
    return output if bias is None else output + bias


def _replicated(config: TransformerConfig, outputs: int, *, bias: bool) -> nn.Linear:
    """A small linear that every process holds whole. Under sequence parallelism its gradient is summed over positions."""
    linear = nn.Linear(config.hidden_size, outputs, bias=bias, dtype=config.params_dtype)
    for parameter in linear.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return linear


def _in_fp32(linear: nn.Linear, hidden_TBH: torch.Tensor) -> torch.Tensor:
    return functional.linear(
        hidden_TBH.float(), linear.weight.float(), None if linear.bias is None else linear.bias.float()
    )
