"""Layer modules of Megatron-Core, adapted for layouts that its own do not support."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_specialm.config.precision import Linear
from megatron_specialm.model.weights import LINEAR_PLACES


class TorchNorm:
    """Builds PyTorch's `LayerNorm` or `RMSNorm`, according to the config.

    Under sequence parallelism each process normalizes its own positions, so a norm's gradient must be summed over the
    tensor-parallel group. Megatron-Core does that for parameters with the attribute `sequence_parallel`. It refuses PyTorch's
    norms because they lack the attribute; here it is set.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        norm = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        module = norm(hidden_size, eps=eps)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module


class FeedForward(MLP):
    """Megatron-Core's MLP, made safe to recompute.

    It returns its last bias, which a later kernel adds. Under recomputation, the outputs get the recomputation as their
    gradient function. If the output is the parameter itself, the backward pass recurses without end; so this returns a copy.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(T, B, H) -> (T, B, H) and the bias (H,), if there is one."""
        output, bias = super().forward(*args, **kwargs)
        return output, None if bias is None else bias.clone()


def keep_in_bf16(model: torch.nn.Module, linears: Sequence[Linear]) -> None:
    """Under FP8, run some linears of each layer in bf16. Megatron-Core can only switch complete layers."""
    ends = tuple(LINEAR_PLACES[name] for name in linears)
    for name, module in model.named_modules():
        if ends and name.endswith(ends):
            module.forward = partial(_without_fp8, module.forward)


def _without_fp8(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    import transformer_engine.pytorch as te  # is installed: FP8 requires it

    with te.autocast(enabled=False):
        return forward(*args, **kwargs)
