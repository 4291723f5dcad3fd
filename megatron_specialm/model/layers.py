"""Parts of a layer that Megatron-Core has, but not as every layout needs them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_specialm.config.precision import Linear
from megatron_specialm.model.weights import LINEAR_PLACES


class TorchNorm:
    """Builds PyTorch's `LayerNorm` or `RMSNorm`, as the settings say.

    Under sequence parallelism each process norms its own positions, so a norm's gradient is the sum over the tensor
    parallel processes. Megatron-Core sums those of parameters that are marked, and refuses PyTorch's norms for want of
    the mark; here they have it.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        norm = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        module = norm(hidden_size, eps=eps)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module


class FeedForward(MLP):
    """Megatron-Core's feed-forward part, fit to be recomputed.

    It hands on its last bias for a later sum. When the part is recomputed, what it hands out gets the recomputation as
    its gradient's source: were that the parameter itself, the backward pass would call itself without end.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(T, B, H) -> (T, B, H) and the bias (H,), if there is one."""
        output, bias = super().forward(*args, **kwargs)
        return output, None if bias is None else bias.clone()


def keep_in_bf16(model: torch.nn.Module, linears: Sequence[Linear]) -> None:
    """Under FP8, have some linears of each layer multiply bf16 numbers. Megatron-Core's switch is for whole layers."""
    ends = tuple(LINEAR_PLACES[name] for name in linears)
    for name, module in model.named_modules():
        if ends and name.endswith(ends):
            module.forward = partial(_without_fp8, module.forward)


def _without_fp8(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    import transformer_engine.pytorch as te  # FP8 comes from it, so it is there

    with te.autocast(enabled=False):
        return forward(*args, **kwargs)
